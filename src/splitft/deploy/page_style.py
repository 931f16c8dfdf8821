"""The status page's style sheet. The report takes its colours from here, so that a client has the same hue on both."""

from __future__ import annotations

LIGHT: dict[str, str] = {
    "page": "#f6f6f3",
    "card": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#5a636e",
    "line": "#e2e4e0",
    "axis": "#9aa1a9",
    "accent": "#1a6fb0",
    "warn": "#9a5b00",
    "warn-back": "#fff6e3",
    "good": "#0b7a58",
    "bad": "#b3261e",
    "c0": "#1a6fb0",
    "c1": "#b8500f",
    "c2": "#1fa58c",
    "c3": "#8c1d5e",
    "c4": "#b98d0c",
    "c5": "#45339f",
    "grey": "#8a939d",
    "g-client": "#0c8a64",
    "g-up": "#d1790a",
    "g-server": "#6b4fb3",
    "g-down": "#3fa9dc",
    "wait": "#aab1b9",
    "wait-back": "#f4f5f4",
    "gap": "#e6e9e9",
}

DARK: dict[str, str] = {
    "page": "#0e1216",
    "card": "#171c22",
    "ink": "#e8ebee",
    "muted": "#9ea8b3",
    "line": "#2b323a",
    "axis": "#5d6873",
    "accent": "#5fb0f2",
    "warn": "#f0b95a",
    "warn-back": "#2a2213",
    "good": "#4fd0a5",
    "bad": "#ff8f83",
    "c0": "#3b94ec",
    "c1": "#eb9a5e",
    "c2": "#35dcba",
    "c3": "#d0608f",
    "c4": "#ebdd52",
    "c5": "#b9b2ff",
    "grey": "#78838f",
    "g-client": "#2fb98c",
    "g-up": "#f0993c",
    "g-server": "#a48bea",
    "g-down": "#7cc7f0",
    "wait": "#56616d",
    "wait-back": "#1e242b",
    "gap": "#262d35",
}

HUES = ("c0", "c1", "c2", "c3", "c4", "c5", "grey", "g-client", "g-up", "g-server", "g-down", "wait")

_PAGE = """
*{box-sizing:border-box}
html{background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",Helvetica,Arial,sans-serif;
-webkit-text-size-adjust:100%}
body{max-width:1360px;margin:0 auto;padding:26px 20px 48px}
h1{font-size:30px;line-height:1.15;letter-spacing:-.015em;margin:2px 0 6px;overflow-wrap:anywhere}
h2{font-size:15.5px;margin:0}
p{margin:0}
.over{font-size:12.5px;color:var(--muted);letter-spacing:.06em;text-transform:uppercase}
.facts,.say{color:var(--muted);overflow-wrap:anywhere}
.say{font-size:13px}
.pill{display:inline-block;margin-left:8px;padding:2px 10px;border-radius:99px;border:1px solid currentColor;font-size:13px;
font-weight:600;letter-spacing:0;vertical-align:middle;color:var(--muted)}
.pill.running{color:var(--good)}
.pill.draining,.pill.starting{color:var(--warn)}
.pill.finished{color:var(--accent)}
.gone{position:sticky;top:0;z-index:3;border-left:4px solid var(--bad);background:var(--card);box-shadow:0 1px 8px rgba(0,0,0,.18);
border-radius:0 8px 8px 0;padding:10px 16px;margin-bottom:14px;font-weight:550}
.stale main,.stale header{opacity:.55}
.stage{display:flex;justify-content:space-between;gap:6px 20px;flex-wrap:wrap;margin:16px 0 6px}
.stage b{font-weight:600;overflow-wrap:anywhere}
.track{background:var(--gap);border-radius:99px;overflow:hidden;height:8px}
.track i{display:block;height:100%;width:0;border-radius:99px;background:var(--accent)}
.keys{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:10px;margin:16px 0;padding:0}
.key,.card{background:var(--card);border:1px solid var(--line);border-radius:10px;min-width:0}
.key{padding:11px 14px 10px}
.key dt{font-size:13px;color:var(--muted)}
.key dd{margin:0}
.key .big{font-size:23px;font-weight:650;line-height:1.3;letter-spacing:-.02em;font-variant-numeric:tabular-nums;white-space:nowrap}
.key .big span{color:var(--muted);font-weight:450}
.key .sub{font-size:13px;color:var(--muted)}
.card{padding:14px 18px 12px;margin:0}
.figs{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px;margin-top:14px}
.wide{grid-column:1/-1}
.figs .card{display:flex;flex-direction:column}
.plot{margin-top:auto;padding-top:8px;min-height:60px}
.plot svg{display:block;width:100%}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:6px 0 0;padding:0;font-size:12.5px;color:var(--muted)}
.legend i{display:inline-block;width:14px;height:10px;border-radius:2px;margin-right:6px;background:var(--c)}
.legend i.stroke{height:3px;vertical-align:middle}
.empty{color:var(--muted);font-size:13.5px;padding:18px 0 14px}
[hidden]{display:none}
"""

_TABLE = """
.scroll{overflow:auto;max-height:660px;margin-top:6px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:7px 0 7px 13px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:middle}
th{font-weight:600;color:var(--muted);font-size:12.5px;padding-top:2px;position:sticky;top:0;
background:var(--card);z-index:1;vertical-align:bottom;line-height:1.25}
th:nth-child(n+9){white-space:normal}
th:first-child,td:first-child{text-align:left;padding-left:0}
th.left,td.left{text-align:left}
tr:last-child td{border-bottom:0}
td small{display:block;color:var(--muted);font-size:12px;line-height:1.3}
.who{display:flex;align-items:center;gap:9px}
.who div{min-width:0}
.who b{display:block;font-weight:600;max-width:210px;overflow:hidden;text-overflow:ellipsis}
.who small{margin-top:-1px}
.dot{flex:none;width:10px;height:10px;border-radius:50%;background:var(--c)}
.chip{display:inline-block;padding:1px 9px;border-radius:99px;font-size:12.5px;font-weight:600;color:var(--t);
background:color-mix(in srgb,var(--t) 13%,var(--card))}
.s-training{--t:var(--accent)}.s-ready,.s-done{--t:var(--good)}.s-waiting,.s-connecting,.s-absent{--t:var(--muted)}
.s-late{--t:var(--warn)}.s-lost,.s-excluded{--t:var(--bad)}
.s-absent{background:none;box-shadow:inset 0 0 0 1px var(--line)}
.s-excluded{background:var(--bad);color:var(--card)}
.away td:not(:first-child):not(.keep){color:var(--muted)}
.steps{width:104px;text-align:left}
.steps .track{height:5px;margin-top:3px}
.steps .track i{background:var(--c)}
.spark{width:96px;height:26px;display:block;margin-left:auto}
.events{list-style:none;margin:8px 0 0;padding:0;font-size:13.5px;max-height:330px;overflow-y:auto}
.events li{display:grid;grid-template-columns:64px minmax(0,1fr);gap:0 12px;padding:5px 0;border-bottom:1px solid var(--line)}
.events li:last-child{border-bottom:0}
.events time{color:var(--muted);font-variant-numeric:tabular-nums}
.events p{overflow-wrap:anywhere}
.events .warning{color:var(--warn)}
.events .error{color:var(--bad);font-weight:550}
.events em{font-style:normal;font-weight:600}
.events u{text-decoration:none;color:var(--muted)}
footer{margin-top:22px;color:var(--muted);font-size:13px}
"""

_PLOT = """
svg text{fill:var(--muted);font-size:11.5px;font-family:inherit}
svg text.strong{fill:var(--ink);font-weight:650}
svg text.halo{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.grid{stroke:var(--line);stroke-width:1}
.axis{stroke:var(--axis);stroke-width:1}
.curve{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.thin{stroke-width:1.5}
.point{fill:var(--c);stroke:var(--card);stroke-width:1.5}
.bar{fill:var(--c)}
.hover{stroke:var(--axis);stroke-width:1;stroke-dasharray:3 3}
.ink{--c:var(--ink)}
"""

_NARROW = """
@media (min-width:861px) and (max-width:1300px){th:nth-child(9),td:nth-child(9),th:nth-child(12),td:nth-child(12){display:none}
th,td{padding-left:11px}.who b{max-width:150px}}
@media (min-width:861px) and (max-width:1100px){th:nth-child(8),td:nth-child(8){display:none}}
@media (max-width:1180px){.keys{grid-template-columns:repeat(3,minmax(0,1fr))}}
@media (max-width:860px){.figs{grid-template-columns:minmax(0,1fr)}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.scroll{max-height:none}table,tbody{display:block}
tr{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:8px 12px;padding:12px 0;border-bottom:1px solid var(--line)}
tr:last-child{border-bottom:0}
td,td.left{display:block;padding:0;border:0;text-align:left;grid-column:span 2}
td:first-child{grid-column:span 4;order:-4}
td:nth-child(2){text-align:right;order:-3}
td:nth-child(3){grid-column:span 4;order:-2}
td:last-child{text-align:right;order:-1}
td[data-label]::before{content:attr(data-label);display:block;font-size:12px;color:var(--muted)}
.steps{width:auto}td{min-width:0}.spark{margin-left:0}.who b{max-width:none}}
@media (max-width:560px){body{padding:18px 12px 36px}.card{padding:12px 14px 10px}h1{font-size:25px}
.keys{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}.key{padding:9px 12px}.key .big{font-size:20px}}
@media (prefers-reduced-motion:no-preference){.track i{transition:width .6s ease}}
"""


def style_sheet() -> str:
    """The whole sheet, the same bytes every time."""
    light, dark = _variables(LIGHT), _variables(DARK)
    modes = f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return modes + _PAGE + _TABLE + _PLOT + _NARROW + "".join(f".{hue}{{--c:var(--{hue})}}" for hue in HUES)


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())
