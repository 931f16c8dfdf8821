"""The report's style sheet: the colours of the status page and those of plots, for light, dark and print. Plots refer to the classes below.

The six client hues, the stage hues and the kinds of bytes stay apart under simulated protanopia, deuteranopia and tritanopia
(Machado, Oliveira and Fernandes 2009); `tests/unit/test_report_style.py` measures it.
"""

from __future__ import annotations

from splitft.deploy import page_style

LIGHT: dict[str, str] = {
    **page_style.LIGHT,
    "on-client": "#ffffff",
    "on-up": "#1b1f24",
    "on-server": "#ffffff",
    "on-down": "#1b1f24",
    "q0": "#e9f1f9",
    "q1": "#cbdff0",
    "q2": "#a3c8e6",
    "q3": "#73aad6",
    "q4": "#2f78b4",
    "q5": "#1c5a94",
    "q6": "#0c3d6e",
    "on-low": "#1b1f24",
    "on-high": "#ffffff",
}

DARK: dict[str, str] = {
    **page_style.DARK,
    "on-client": "#0e1216",
    "on-up": "#0e1216",
    "on-server": "#0e1216",
    "on-down": "#0e1216",
    "q0": "#182838",
    "q1": "#1c3a55",
    "q2": "#225077",
    "q3": "#2b6a9e",
    "q4": "#4a8fca",
    "q5": "#82b7e3",
    "q6": "#bcdaf3",
    "on-low": "#e8ebee",
    "on-high": "#0e1216",
}

CLIENT_HUES = ("c0", "c1", "c2", "c3", "c4", "c5")
STAGE_HUES = ("g-client", "g-up", "g-server", "g-down")
_KINDS = {"activations": "c0", "gradients": "c1", "labels": "c4", "adapters": "c2", "weights": "c3", "control": "grey", "other": "c5"}

_PAGE = """
*{box-sizing:border-box}
html{background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",Helvetica,Arial,sans-serif;
-webkit-text-size-adjust:100%}
body{max-width:1240px;margin:0 auto;padding:36px 20px 60px}
h1{font-size:32px;line-height:1.15;letter-spacing:-.015em;margin:2px 0 8px;overflow-wrap:anywhere}
h2{font-size:20px;letter-spacing:-.01em;margin:44px 0 14px}
h3{font-size:15.5px;margin:0 0 2px}
p{margin:0}
a{color:var(--accent)}
a:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:3px}
.over{font-size:12.5px;color:var(--muted);letter-spacing:.06em;text-transform:uppercase}
.facts{color:var(--muted);overflow-wrap:anywhere}
.pill{display:inline-block;margin-left:10px;padding:2px 10px;border-radius:99px;border:1px solid currentColor;
font-size:13px;font-weight:600;
letter-spacing:0;vertical-align:middle}
.pill.finished{color:var(--good)}
.pill.interrupted,.pill.unfinished{color:var(--warn)}
nav{margin:14px 0 0;font-size:14px}
nav a{margin-right:18px;text-decoration:none}
nav a:hover{text-decoration:underline}
.keys{display:grid;grid-template-columns:1.4fr 1.2fr repeat(4,1fr);gap:10px;margin:22px 0 14px;padding:0}
.key{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px 11px;min-width:min-content}
.key dt{font-size:13px;color:var(--muted);margin-bottom:2px}
.key dd{margin:0}
.key .big{font-size:24px;font-weight:650;line-height:1.25;letter-spacing:-.02em;font-variant-numeric:tabular-nums;white-space:nowrap}
.key:first-child .big{font-size:31px;line-height:.97}
.key .big .from{color:var(--muted);font-weight:450}
.key .sub{font-size:13px;color:var(--muted)}
.note{border-left:4px solid var(--warn);background:var(--warn-back);border-radius:0 8px 8px 0;padding:10px 16px}
.warnings{margin-top:10px}
.warnings ul{margin:2px 0 0;padding-left:20px;overflow-wrap:anywhere}
.figs{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px;align-items:stretch}
.fig{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px 10px;margin:0;
min-width:0;display:flex;flex-direction:column}
.fig details{margin-top:auto;padding-top:6px}
.fig.wide{grid-column:1/-1}
.fig.below{margin-top:16px}
.fig .say{font-size:13.5px;color:var(--muted);overflow-wrap:anywhere}
.plot{overflow-x:auto;margin-top:10px}
.plot svg{display:block;width:100%;height:auto}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:3px 16px;margin:9px 0 0;padding:0;font-size:12.5px}
.legend li{display:flex;align-items:center;gap:6px;min-width:0;overflow-wrap:anywhere}
.legend svg{flex:none;width:20px;height:12px}
details{font-size:13px}
summary{cursor:pointer;color:var(--muted);padding:3px 0;width:fit-content}
.scroll{overflow:auto;max-height:420px;margin-top:6px}
.scroll.open{max-height:none}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:4px 12px 4px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--muted);position:sticky;top:0;background:var(--card)}
th:first-child,td:first-child{text-align:left}
td.left,th.left{text-align:left}
tr:last-child td{border-bottom:0}
tr.sum td{font-weight:650}
#client-table th{white-space:normal;vertical-align:bottom;line-height:1.25;max-width:84px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;min-width:0}
pre{margin:8px 0 0;font:12.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere}
.config pre{columns:2;column-gap:36px}
.steps{margin:6px 0 0;padding-left:20px}
.refs{margin:6px 0 0;padding-left:20px;overflow-wrap:anywhere}
footer{margin-top:40px;color:var(--muted);font-size:13px}
.hidden{position:absolute;width:0;height:0}
@media screen and (max-width:1120px){.keys{grid-template-columns:repeat(auto-fit,minmax(190px,1fr))}}
@media screen and (max-width:820px){.figs{grid-template-columns:minmax(0,1fr)}.config pre{columns:1}
.key:first-child{grid-column:1/-1}
.plot svg{min-width:440px}.fig.wide .plot svg{min-width:820px}body{padding:22px 12px 40px}}
"""

_PLOT = """
svg .t{fill:var(--muted);font-size:12px;font-family:inherit}
svg .t.small{font-size:11px}
svg .t.title{font-size:12px}
svg .t.strong{fill:var(--ink);font-weight:650}
svg .t.name{fill:var(--ink);fill:color-mix(in srgb,var(--c) 72%,var(--ink));font-weight:550}
svg .t.name.strong{font-weight:700}
.grid{stroke:var(--line);stroke-width:1}
.axis{stroke:var(--axis);stroke-width:1}
.rule{stroke:var(--line);stroke-width:1}
.line{fill:none;stroke:var(--c);stroke-linejoin:round;stroke-linecap:round}
.thin{stroke-width:1.8}
.bold{stroke-width:3}
.dash{stroke-dasharray:7 4}
.bridge{stroke-width:1.4;stroke-dasharray:1 5;opacity:.7}
.dot{fill:var(--c);stroke:var(--card);stroke-width:1.2;stroke-dasharray:none}
.outline{--c:var(--ink)}
.ink{--c:var(--ink)}
.band{fill:var(--c0);opacity:.3}
.band.faint{opacity:.16}
.bar,.flat,.fill{fill:var(--c)}
.bar{stroke:var(--card);stroke-width:.8}
.gap{fill:var(--gap);stroke:var(--card);stroke-width:.8}
.absent{fill:none;stroke:var(--line);stroke-dasharray:2 3}
.refused{fill:var(--c1);stroke:var(--card);stroke-width:1}
.partial{fill:var(--c4);stroke:var(--card);stroke-width:1}
.cross{fill:none;stroke:var(--bad);stroke-width:2;stroke-linecap:round}
.cut-mark{fill:var(--c1);stroke:var(--card);stroke-width:1}
.merge{stroke:var(--ink);stroke-width:1.2;stroke-dasharray:3 3;opacity:.75}
.open{fill:var(--card);stroke:var(--c);stroke-width:1.8;stroke-dasharray:none}
.held{fill:var(--muted)}
svg .t.lost{fill:var(--bad)}
.bar.g-queue,.flat.g-queue{fill:url(#hatch-queue)}
.bar.g-barrier,.flat.g-barrier{fill:url(#hatch-barrier)}
.bar.g-away,.flat.g-away{fill:url(#hatch-away)}
.hatch-back{fill:var(--wait-back)}
.hatch-queue-line{stroke:var(--ink);stroke-width:1.3;opacity:.62}
.hatch-barrier-line{stroke:var(--wait);stroke-width:1.3}
.hatch-away-line{stroke:var(--bad);stroke-width:1.3;opacity:.6}
svg .on{font-size:11.5px;font-weight:600}
svg .halo{fill:var(--ink);paint-order:stroke;stroke:var(--card);stroke-width:5px;stroke-linejoin:round}
.ramp{stroke:var(--axis);stroke-width:.5}
"""

_PRINT = """
@page{margin:11mm}
@media print{html{background:none;font-size:10pt;-webkit-print-color-adjust:exact;print-color-adjust:exact}body{max-width:none;padding:0}
nav,details.data{display:none}
.fig,.card,.key,.note{break-inside:avoid}
h2,h3,figcaption,.legend{break-after:avoid}.figs{gap:8px}.keys{grid-template-columns:repeat(3,1fr)}
h2{margin:22px 0 8px}
.fig,.card{padding:10px 12px}.plot,.scroll{overflow:visible;max-height:none}
a{color:inherit;text-decoration:none}}
"""


def style_sheet() -> str:
    """The whole sheet, the same bytes every time."""
    light, dark = _variables(LIGHT), _variables(DARK)
    modes = f":root{{color-scheme:light dark;{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return modes + _PAGE + _PLOT + _classes() + _PRINT


def plot_sheet() -> str:
    """The part that a plot needs in a file of its own: colours for light and dark, marks and text."""
    light, dark = _variables(LIGHT), _variables(DARK)
    return f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_PLOT}{_classes()}"


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def _classes() -> str:
    """Rules that only tie a class to its colour: clients, kinds of bytes, stages, the ramp and the text upon them."""
    rules = [f".{hue}{{--c:var(--{hue})}}" for hue in (*CLIENT_HUES, *STAGE_HUES)]
    rules += [f".k-{kind}{{--c:var(--{hue})}}" for kind, hue in _KINDS.items()]
    rules += [".g-other{--c:var(--grey)}", "svg .on.g-other-ink{fill:var(--ink)}"]
    rules += [f"svg .on.{hue}-ink{{fill:var(--on-{hue[2:]})}}" for hue in STAGE_HUES]
    for step in range(7):
        rules.append(
            f".q{step}{{fill:var(--q{step});--c:var(--q{step})}}svg .on.q{step}-ink{{fill:var(--on-{'low' if step < 4 else 'high'})}}"
        )
    return "".join(rules) + "\n"
