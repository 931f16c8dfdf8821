"""`splitft cite`: the references behind the methods a configuration uses.

A component names what it follows in `references: ClassVar[tuple[str, ...]]` (arXiv ids). This file holds the full reference for each
id, and what the parts of a run that are no component rest on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from splitft.config import Component, RunConfig

Catalogue = Mapping[str, Mapping[str, type]]


class Reference(NamedTuple):
    """One paper. `key` is its BibTeX key, `arxiv` its arXiv id."""

    key: str
    authors: str
    title: str
    year: int
    arxiv: str
    venue: str = ""


_PAPERS = (
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
)
REFERENCES: Mapping[str, Reference] = {paper.arxiv: paper for paper in _PAPERS}
# What every run rests on, and what a U-shaped one adds; the rest is named by the components.
U_SHAPE = "1812.00564"
ALWAYS = ("2604.26388", "2106.09685", "2004.12088", "2407.00952", "1711.05101")
SEAMS = ("data", "partition", "policy", "uplink", "downlink", "aggregator")


def catalogue() -> Catalogue:
    """The tables of every component, with their classes. Imports torch, as some components do."""
    from splitft.catalog import CATALOG

    return CATALOG


def references_of(config: RunConfig, components: Catalogue) -> list[str]:
    """The arXiv ids behind `config`, each once: what every run uses, then what its components name, the U-shape if it is one."""
    found = list(ALWAYS)
    for seam in SEAMS:
        component: Component = getattr(config, seam)
        for name in _names({"name": component.name, **component.fields}):
            found += getattr(components.get(seam, {}).get(name), "references", ())
    if config.split.labels == "client":
        found.append(U_SHAPE)
    return list(dict.fromkeys(found))


def _names(fields: Mapping[str, Any]) -> Iterator[str]:
    """The component's name and those of the components nested in its fields."""
    if isinstance(fields.get("name"), str):
        yield fields["name"]
    for value in fields.values():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                yield from _names(inner)


def render(ids: Iterable[str]) -> str:
    """The references as BibTeX. An id without an entry here is still named."""
    return "\n\n".join(_bibtex(REFERENCES[name]) if name in REFERENCES else f"% arXiv:{name}" for name in ids)


def _bibtex(paper: Reference) -> str:
    fields = {
        "author": paper.authors,
        "title": f"{{{paper.title}}}",
        "year": str(paper.year),
        **({"booktitle": paper.venue} if paper.venue else {}),
        "eprint": paper.arxiv,
        "archivePrefix": "arXiv",
    }
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@{'inproceedings' if paper.venue else 'misc'}{{{paper.key},\n{lines}\n}}"
