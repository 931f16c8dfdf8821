"""Full references of papers on privacy, for `splitft cite`."""

from __future__ import annotations

from splitft.apps.papers import Reference

PAPERS = (
    Reference(
        "mcmahan2018learning",
        "McMahan, H. Brendan and Ramage, Daniel and Talwar, Kunal and Zhang, Li",
        "Learning Differentially Private Recurrent Language Models",
        2018,
        "1710.06963",
        "International Conference on Learning Representations",
    ),
    Reference(
        "bonawitz2016practical",
        "Bonawitz, Keith and Ivanov, Vladimir and Kreuter, Ben and Marcedone, Antonio and McMahan, H. Brendan and Patel, Sarvar and "
        "Ramage, Daniel and Segal, Aaron and Seth, Karn",
        "Practical Secure Aggregation for Federated Learning on User-Held Data",
        2016,
        "1611.04482",
    ),
    Reference(
        "pasquini2022eluding",
        "Pasquini, Dario and Francati, Danilo and Ateniese, Giuseppe",
        "Eluding Secure Aggregation in Federated Learning via Model Inconsistency",
        2022,
        "2111.07380",
        "ACM SIGSAC Conference on Computer and Communications Security",
    ),
    Reference(
        "balle2018improving",
        "Balle, Borja and Wang, Yu-Xiang",
        "Improving the Gaussian Mechanism for Differential Privacy: Analytical Calibration and Optimal Denoising",
        2018,
        "1805.06530",
        "International Conference on Machine Learning",
    ),
    Reference(
        "andrew2021differentially",
        "Andrew, Galen and Thakkar, Om and McMahan, H. Brendan and Ramaswamy, Swaroop",
        "Differentially Private Learning with Adaptive Clipping",
        2021,
        "1905.03871",
        "Advances in Neural Information Processing Systems",
    ),
    Reference(
        "wang2019subsampled",
        "Wang, Yu-Xiang and Balle, Borja and Kasiviswanathan, Shiva Prasad",
        "Subsampled R{\\'e}nyi Differential Privacy and Analytical Moments Accountant",
        2019,
        "1808.00087",
        "International Conference on Artificial Intelligence and Statistics",
    ),
    Reference(
        "dong2022gaussian",
        "Dong, Jinshuo and Roth, Aaron and Su, Weijie J.",
        "Gaussian Differential Privacy",
        2022,
        "1905.02383",
        "Journal of the Royal Statistical Society Series B: Statistical Methodology",
    ),
    Reference(
        "canonne2020discrete",
        "Canonne, Cl{\\'e}ment L. and Kamath, Gautam and Steinke, Thomas",
        "The Discrete Gaussian for Differential Privacy",
        2020,
        "2004.00010",
        "Advances in Neural Information Processing Systems",
    ),
)
