"""Full references of papers on splitting, federating and aggregating, for `splitft cite`."""

from __future__ import annotations

from typing import NamedTuple


class Reference(NamedTuple):
    """One paper. `key` is its BibTeX key, `arxiv` its arXiv id."""

    key: str
    authors: str
    title: str
    year: int
    arxiv: str
    venue: str = ""


PAPERS = (
    Reference(
        "shan2026splitft",
        "Shan, Yimeng and Zhang, Zhaorui and Di, Sheng and Liu, Yu and Lu, Xiaoyi and Liu, Benben",
        "SplitFT: An Adaptive Federated Split Learning System For LLMs Fine-Tuning",
        2026,
        "2604.26388",
    ),
    Reference(
        "hu2021lora",
        "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and Wang, Lu "
        "and Chen, Weizhu",
        "LoRA: Low-Rank Adaptation of Large Language Models",
        2021,
        "2106.09685",
        "International Conference on Learning Representations, 2022",
    ),
    Reference(
        "mcmahan2017communication",
        'McMahan, H. Brendan and Moore, Eider and Ramage, Daniel and Hampson, Seth and Ag{\\"u}era y Arcas, Blaise',
        "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        2017,
        "1602.05629",
        "International Conference on Artificial Intelligence and Statistics",
    ),
    Reference(
        "thapa2022splitfed",
        "Thapa, Chandra and Chamikara, M. A. P. and Camtepe, Seyit and Sun, Lichao",
        "SplitFed: When Federated Learning Meets Split Learning",
        2022,
        "2004.12088",
        "AAAI Conference on Artificial Intelligence",
    ),
    Reference(
        "lin2024splitlora",
        "Lin, Zheng and Hu, Xuanjie and Zhang, Yuxin and Chen, Zhe and Fang, Zihan and Chen, Xianhao and Li, Ang "
        "and Vepakomma, Praneeth and Gao, Yue",
        "SplitLoRA: A Split Parameter-Efficient Fine-Tuning Framework for Large Language Models",
        2024,
        "2407.00952",
    ),
    Reference(
        "loshchilov2019decoupled",
        "Loshchilov, Ilya and Hutter, Frank",
        "Decoupled Weight Decay Regularization",
        2019,
        "1711.05101",
        "International Conference on Learning Representations",
    ),
    Reference(
        "hsu2019measuring",
        "Hsu, Tzu-Ming Harry and Qi, Hang and Brown, Matthew",
        "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
        2019,
        "1909.06335",
    ),
    Reference(
        "yurochkin2019bayesian",
        "Yurochkin, Mikhail and Agarwal, Mayank and Ghosh, Soumya and Greenewald, Kristjan and Hoang, Trong Nghia and Khazaeni, Yasaman",
        "Bayesian Nonparametric Federated Learning of Neural Networks",
        2019,
        "1905.12022",
        "International Conference on Machine Learning",
    ),
    Reference(
        "vepakomma2018split",
        "Vepakomma, Praneeth and Gupta, Otkrist and Swedish, Tristan and Raskar, Ramesh",
        "Split learning for health: Distributed deep learning without sharing raw patient data",
        2018,
        "1812.00564",
    ),
    Reference(
        "gawali2020comparison",
        "Gawali, Manish and C S, Arvind and Suryavanshi, Shriya and Madaan, Harshit and Gaikwad, Ashrika and KN, Bhanu Prakash "
        "and Kulkarni, Viraj and Pant, Aniruddha",
        "Comparison of Privacy-Preserving Distributed Deep Learning Methods in Healthcare",
        2020,
        "2012.12591",
    ),
    Reference(
        "lin2025hsplitlora",
        "Lin, Zheng and Zhang, Yuxin and Chen, Zhe and Fang, Zihan and Chen, Xianhao and Vepakomma, Praneeth and Ni, Wei and Luo, Jun "
        "and Gao, Yue",
        "HSplitLoRA: A Heterogeneous Split Parameter-Efficient Fine-Tuning Framework for Large Language Models",
        2025,
        "2505.02795",
    ),
    Reference(
        "lin2024adaptsfl",
        "Lin, Zheng and Qu, Guanqiao and Wei, Wei and Chen, Xianhao and Leung, Kin K.",
        "AdaptSFL: Adaptive Split Federated Learning in Resource-Constrained Edge Networks",
        2024,
        "2403.13101",
    ),
    Reference(
        "yan2023have",
        "Yan, Dengke and Hu, Ming and Xia, Zeke and Yang, Yanxin and Xia, Jun and Xie, Xiaofei and Chen, Mingsong",
        "Have Your Cake and Eat It Too: Toward Efficient and Accurate Split Federated Learning",
        2023,
        "2311.13163",
    ),
    Reference(
        "zhao2025efficient",
        "Zhao, Kai and Yang, Zhaohui and Hu, Ye and Chen, Mingzhe and others",
        "Efficient Split Federated Learning for Large Language Models over Communication Networks",
        2025,
        "2504.14667",
    ),
    Reference(
        "ramesh2026unveiling",
        "Ramesh, Hariharan and Murugaiyan, Someshwaran and Dass, Jyotikrishna",
        "Unveiling the Depth-Performance Dilemma in Split-Federated Fine-tuning of LLMs",
        2026,
        "2608.22188",
    ),
    Reference(
        "zhou2025communication",
        "Zhou, Zizhen and Liang, Ying-Chang and Cheng, Yanyu and Lim, Wei Yang Bryan",
        "Communication-Pipelined Split Federated Learning for Foundation Model Fine-Tuning in UAV Networks",
        2025,
        "2511.15404",
    ),
    Reference(
        "liu2025hlora",
        "Liu, Qianli and Zhang, Zhaorui and Yao, Xin and Liu, Benben",
        "HLoRA: Efficient Federated Learning System for LLM Heterogeneous Fine-Tuning",
        2025,
        "2503.00813",
    ),
    Reference(
        "bai2024federated",
        "Bai, Jiamu and Chen, Daoyuan and Qian, Bingchen and Yao, Liuyi and Li, Yaliang",
        "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
        2024,
        "2402.11505",
        "Advances in Neural Information Processing Systems",
    ),
    Reference(
        "wu2026preventing",
        "Wu, Fei and Hu, Jia and Min, Geyong and Wang, Shiqiang",
        "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity",
        2026,
        "2602.13486",
    ),
    Reference(
        "wang2024flora",
        "Wang, Ziyao and Shen, Zheyu and He, Yexiao and Sun, Guoheng and Wang, Hongyi and Lyu, Lingjuan and Li, Ang",
        "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
        2024,
        "2409.05976",
        "Advances in Neural Information Processing Systems",
    ),
    Reference(
        "singhal2025fedex",
        "Singhal, Raghav and Ponkshe, Kaustubh and Vepakomma, Praneeth",
        "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models",
        2025,
        "2410.09432",
        "Annual Meeting of the Association for Computational Linguistics",
    ),
    Reference(
        "sun2024improving",
        "Sun, Youbang and Li, Zitao and Li, Yaliang and Ding, Bolin",
        "Improving LoRA in Privacy-preserving Federated Learning",
        2024,
        "2403.12313",
        "International Conference on Learning Representations",
    ),
    Reference(
        "cho2024heterogeneous",
        "Cho, Yae Jee and Liu, Luyang and Xu, Zheng and Fahrezi, Aldi and Joshi, Gauri",
        "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
        2024,
        "2401.06432",
        "Conference on Empirical Methods in Natural Language Processing",
    ),
    Reference(
        "liu2025ecolora",
        "Liu, Han and Wen, Ruoyao and Nair, Srijith and Liu, Jia and Lou, Wenjing and Zhang, Chongjie and Yeoh, William "
        "and Vorobeychik, Yevgeniy and Zhang, Ning",
        "EcoLoRA: Communication-Efficient Federated Fine-Tuning of Large Language Models",
        2025,
        "2506.02001",
        "Conference on Empirical Methods in Natural Language Processing",
    ),
    Reference(
        "theologitis2025fdaopt",
        "Theologitis, Michail and Samoladas, Vasilis and Deligiannakis, Antonios",
        "FDA-Opt: Communication-Efficient Federated Fine-Tuning of Language Models",
        2025,
        "2505.04535",
    ),
    Reference(
        "reddi2021adaptive",
        "Reddi, Sashank J. and Charles, Zachary and Zaheer, Manzil and Garrett, Zachary and Rush, Keith and Kone{\\v{c}}n{\\'y}, Jakub "
        "and Kumar, Sanjiv and McMahan, H. Brendan",
        "Adaptive Federated Optimization",
        2021,
        "2003.00295",
        "International Conference on Learning Representations",
    ),
    Reference(
        "wang2020tackling",
        "Wang, Jianyu and Liu, Qinghua and Liang, Hao and Joshi, Gauri and Poor, H. Vincent",
        "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
        2020,
        "2007.07481",
        "Advances in Neural Information Processing Systems",
    ),
    Reference(
        "yin2018byzantine",
        "Yin, Dong and Chen, Yudong and Ramchandran, Kannan and Bartlett, Peter",
        "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
        2018,
        "1803.01498",
        "International Conference on Machine Learning",
    ),
    Reference(
        "sun2019can",
        "Sun, Ziteng and Kairouz, Peter and Suresh, Ananda Theertha and McMahan, H. Brendan",
        "Can You Really Backdoor Federated Learning?",
        2019,
        "1911.07963",
    ),
    Reference(
        "blanchard2017machine",
        "Blanchard, Peva and El Mhamdi, El Mahdi and Guerraoui, Rachid and Stainer, Julien",
        "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
        2017,
        "1703.02757",
        "Advances in Neural Information Processing Systems",
    ),
    Reference(
        "nguyen2022federated",
        "Nguyen, John and Malik, Kshitiz and Zhan, Hongyuan and Yousefpour, Ashkan and Rabbat, Michael and Malek, Mani and Huba, Dzmitry",
        "Federated Learning with Buffered Asynchronous Aggregation",
        2022,
        "2106.06639",
        "International Conference on Artificial Intelligence and Statistics",
    ),
    Reference(
        "xie2019asynchronous",
        "Xie, Cong and Koyejo, Sanmi and Gupta, Indranil",
        "Asynchronous Federated Optimization",
        2019,
        "1903.03934",
    ),
)
