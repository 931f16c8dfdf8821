"""Full references of papers on codecs and their controllers, and of those cited for a single fact, for `splitft cite`."""

from __future__ import annotations

from splitft.apps.papers import Reference

PAPERS = (
    Reference(
        "dettmers2022int8",
        "Dettmers, Tim and Lewis, Mike and Belkada, Younes and Zettlemoyer, Luke",
        "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
        2022,
        "2208.07339",
        "Advances in Neural Information Processing Systems",
    ),
    Reference(
        "alistarh2017qsgd",
        "Alistarh, Dan and Grubic, Demjan and Li, Jerry Z. and Tomioka, Ryota and Vojnovic, Milan",
        "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding",
        2017,
        "1610.02132",
        "Advances in Neural Information Processing Systems",
    ),
    Reference(
        "li2026splitcom",
        "Li, Tao and Tang, Yulin and Song, Yiyang and Wu, Cong and Liu, Xihui and Li, Pan and Chen, Xianhao",
        "SplitCom: Communication-efficient Split Federated Fine-tuning of LLMs via Temporal Compression",
        2026,
        "2602.10564",
    ),
    Reference(
        "li2026splitlite",
        "Li, Tao and Tang, Yulin and Guo, Qi and Chen, Xianhao",
        "SplitLite: Low-Rank Residual Compression for Split Learning",
        2026,
        "2608.23018",
    ),
    Reference(
        "wang2022finetuning",
        "Wang, Jue and Yuan, Binhang and Rimanic, Luka and He, Yongjun and Dao, Tri and Chen, Beidi and R{\\'e}, Christopher and Zhang, Ce",
        "Fine-tuning Language Models over Slow Networks using Activation Compression with Guarantees",
        2022,
        "2206.01299",
        "Advances in Neural Information Processing Systems",
    ),
    Reference(
        "karimireddy2019error",
        "Karimireddy, Sai Praneeth and Rebjock, Quentin and Stich, Sebastian U. and Jaggi, Martin",
        "Error Feedback Fixes SignSGD and other Gradient Compression Schemes",
        2019,
        "1901.09847",
        "International Conference on Machine Learning",
    ),
    Reference(
        "stich2018sparsified",
        "Stich, Sebastian U. and Cordonnier, Jean-Baptiste and Jaggi, Martin",
        "Sparsified SGD with Memory",
        2018,
        "1809.07599",
        "Advances in Neural Information Processing Systems",
    ),
    Reference(
        "konecny2016federated",
        "Kone{\\v{c}}n{\\'y}, Jakub and McMahan, H. Brendan and Yu, Felix X. and Richt{\\'a}rik, Peter and Suresh, Ananda Theertha "
        "and Bacon, Dave",
        "Federated Learning: Strategies for Improving Communication Efficiency",
        2016,
        "1610.05492",
    ),
    Reference(
        "zheng2023reducing",
        "Zheng, Fei and Chen, Chaochao and Lyu, Lingjuan and Yao, Binhui",
        "Reducing Communication for Split Learning by Randomized Top-k Sparsification",
        2023,
        "2305.18469",
        "International Joint Conference on Artificial Intelligence",
    ),
    Reference(
        "wang2023privatelora",
        "Wang, Yiming and Lin, Yu and Zeng, Xiaodong and Zhang, Guannan",
        "PrivateLoRA For Efficient Privacy Preserving LLM",
        2023,
        "2311.14030",
    ),
    Reference(
        "duda2013asymmetric",
        "Duda, Jarek",
        "Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of arithmetic coding",
        2013,
        "1311.2540",
    ),
    Reference(
        "halko2009finding",
        "Halko, Nathan and Martinsson, Per-Gunnar and Tropp, Joel A.",
        "Finding structure with randomness: Probabilistic algorithms for constructing approximate matrix decompositions",
        2009,
        "0909.4061",
    ),
    Reference(
        "lillicrap2015continuous",
        "Lillicrap, Timothy P. and Hunt, Jonathan J. and Pritzel, Alexander and Heess, Nicolas and Erez, Tom and Tassa, Yuval and "
        "Silver, David and Wierstra, Daan",
        "Continuous control with deep reinforcement learning",
        2015,
        "1509.02971",
        "International Conference on Learning Representations, 2016",
    ),
    Reference(
        "dachille2024impact",
        "Dachille, Justin and Huang, Chao and Liu, Xin",
        "The Impact of Cut Layer Selection in Split Federated Learning",
        2024,
        "2412.15536",
    ),
    Reference(
        "chen2025memory",
        "Chen, Xiaopei and Li, Liang and Ji, Fei and Wu, Wen",
        "Memory-Efficient Split Federated Learning for LLM Fine-Tuning on Heterogeneous Mobile Devices",
        2025,
        "2506.02940",
        "IEEE Conference on Computer Communications Workshops",
    ),
    Reference(
        "kaplan2020scaling",
        "Kaplan, Jared and McCandlish, Sam and Henighan, Tom and Brown, Tom B. and Chess, Benjamin and Child, Rewon and Gray, Scott "
        "and Radford, Alec and Wu, Jeffrey and Amodei, Dario",
        "Scaling Laws for Neural Language Models",
        2020,
        "2001.08361",
    ),
    Reference(
        "korthikanti2022reducing",
        "Korthikanti, Vijay and Casper, Jared and Lym, Sangkug and McAfee, Lawrence and Andersch, Michael and Shoeybi, Mohammad and "
        "Catanzaro, Bryan",
        "Reducing Activation Recomputation in Large Transformer Models",
        2022,
        "2205.05198",
    ),
    Reference(
        "chowdhery2022palm",
        "Chowdhery, Aakanksha and Narang, Sharan and Devlin, Jacob and others",
        "PaLM: Scaling Language Modeling with Pathways",
        2022,
        "2204.02311",
    ),
    Reference(
        "das2022enabling",
        "Das, Anish and Kwon, Young D. and Chauhan, Jagmohan and Mascolo, Cecilia",
        "Enabling On-Device Smartphone GPU based Training: Lessons Learned",
        2022,
        "2202.10100",
    ),
)
