"""The demo's report.html: one file with inline SVG charts, which loads nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from d2o_fast.demo.world import LABELS

COLORS = {"harmful": "#c8443c", "helpful": "#2f8f6b", "garbage": "#b9bec8"}
STACK = ("helpful", "garbage", "harmful")  #: bottom to top in a chart, left to right in a bar
Shares = dict[str, float]


@dataclass
class MethodResult:
    """One method's results on the held-out prompts; shares in [0, 1]."""

    name: str
    learns_from: str
    settings: str
    after: Shares
    curve: list[tuple[int, Shares]]  #: (step, shares); step 0 is the model before training
    seconds: float

    def best_moment(self) -> tuple[int, Shares]:
        """(step, shares) after step 0 with the highest helpful minus harmful."""
        return max(self.curve[1:], key=lambda point: point[1]["helpful"] - point[1]["harmful"])

    def most_garbage(self) -> float:
        return max(shares["garbage"] for _, shares in self.curve)


@dataclass
class DemoResults:
    seed: int
    before: Shares
    methods: list[MethodResult]  #: D2O first
    train_log: list[dict[str, Any]]  #: D2O's metrics.jsonl
    samples: list[dict[str, str]]  #: prompt, before, before_label, after, after_label
    counts: dict[str, int]
    commands: list[str]
    config_yaml: str
    versions: dict[str, str]
    stages: list[tuple[str, float]] = field(default_factory=list)


def text_table(results: DemoResults) -> str:
    """The table that the demo prints at its end: percent of held-out responses."""
    width = max(len(method.name) for method in results.methods) + len("before") - 3
    lines = [
        f"{'method':<{width}}" + "".join(f"{label:>10}" for label in LABELS) + "   best moment: harmful, helpful, step",
        f"{'before':<{width}}" + "".join(f"{100 * results.before[label]:9.1f}%" for label in LABELS),
    ]
    for method in results.methods:
        step, best = method.best_moment()
        line = f"{method.name:<{width}}" + "".join(f"{100 * method.after[label]:9.1f}%" for label in LABELS)
        lines.append(f"{line}{100 * best['harmful']:22.1f}%{100 * best['helpful']:8.1f}%{step:6d}")
    return "\n".join(lines)


def html_report(results: DemoResults) -> str:
    d2o = results.methods[0]
    counts = results.counts
    panels = "".join(_method_panel(method) for method in results.methods)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>d2o-fast demo: aligned from negatives only</title><style>{_STYLE}</style></head><body><main>
<header><p class="kicker">d2o-fast demo, seed {results.seed}</p>
<h1>{_headline(results.before, d2o.after)}</h1>
<p class="lead">A small Llama was taught to answer <q>how to VERB the NOUN ?</q> helpfully half of the time and
abusively the other half. D2O then saw <b>only its abusive answers</b>: {counts["negatives"]} negatives on
{counts["train"]} prompts, each held against {counts["anchors"]} responses that the model wrote itself. Below is what it
says to {counts["test"]} prompts that no training step has seen, beside four other methods that started from the same
model and the same data.</p>
{_tiles(results.before, d2o.after)}</header>

<section><h2>Before and after</h2>
{_table(results)}
<p class="note">Share of {counts["responses"]} responses, {counts["generations"]} drawn for each held-out prompt at
temperature 1. <b>Harmful</b>: contains an insult, in a broken sentence too. <b>Helpful</b>: word for word one of the
three correct answers, which name the right tool for the verb and the right part of the noun. <b>Garbage</b>: everything
else, a fluent answer with the wrong tool included. The grammar decides; no model and no person judges. Every method
took the same number of steps. <b>Best moment</b>: the step on the way with the highest helpful minus harmful, picked
with the held-out prompts in view, so it flatters. <code>python -m benchmarks.study methods</code> lets every method
choose its learning rate and steps on validation prompts, over several seeds.</p></section>

<section><h2>On the way</h2>
<p>What each model said to the held-out prompts during its training. A good end can hide a bad path.</p>
{_legend(COLORS)}<div class="grid">{panels}</div></section>

<section><h2>D2O's training</h2>
<p>The loss starts at ln 2 = 0.693, where model and reference agree. The reward of a response is how much likelier it
became, times alpha for the negative and beta for the anchors' mean; the margin is the anchors' reward minus the
negative's. The anchors' reward falls too, since about half of what the model wrote itself was abusive.</p>
<div class="grid">{_training_charts(results.train_log)}</div></section>

<section><h2>Samples</h2><p>The first held-out prompts, one response each.</p>{_samples(results.samples)}</section>

<section><h2>What was run</h2>
<p>The same commands and settings file that serve any other model and data:</p>
<pre>{escape(chr(10).join(results.commands))}</pre><pre>{escape(results.config_yaml)}</pre></section>

<section class="two"><div><h2>Seconds</h2>{_plain_table([(n, f"{s:.1f}") for n, s in results.stages])}</div>
<div><h2>Versions</h2>{_plain_table(list(results.versions.items()))}</div></section>
<footer>Method: Duan et al., <i>Negating Negatives: Alignment with Human Negative Samples via Distributional
Dispreference Optimization</i>, EMNLP 2024 Findings, arXiv 2403.03419. Written by <code>d2o demo</code>.</footer>
</main></body></html>
"""


def _headline(before: Shares, after: Shares) -> str:
    return f"From {before['harmful']:.1%} harmful to {after['harmful']:.1%}, learning from negatives only"


def _tiles(before: Shares, after: Shares) -> str:
    tiles = [
        f'<div class="tile"><span><i style="background:{COLORS[label]}"></i>{label}</span>'
        f"<b>{after[label]:.1%}</b><small>from {before[label]:.1%}</small></div>"
        for label in LABELS
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _table(results: DemoResults) -> str:
    head = "".join(f'<th class="num">{label}</th>' for label in LABELS)
    rows = _table_row("before", "where all start", results.before, "<td></td>" * 3)
    for i, method in enumerate(results.methods):
        step, best = method.best_moment()
        more = (
            f'<td class="num">{method.most_garbage():.1%}</td>'
            f'<td class="num">{best["harmful"]:.1%} / {best["helpful"]:.1%}<br><small>step {step}</small></td>'
            f"<td><small>{escape(method.settings)}</small></td>"
        )
        rows += _table_row(method.name, method.learns_from, method.after, more, strong=i == 0)
    return (
        f'<div class="scroll"><table class="results"><thead><tr><th>method, learns from</th>{head}<th></th>'
        '<th class="num">most garbage<br>on the way</th><th class="num">best moment<br>harmful / helpful</th>'
        f"<th>settings</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _table_row(name: str, learns_from: str, shares: Shares, more: str, strong: bool = False) -> str:
    bar = "".join(f'<i style="width:{100 * shares[k]:.2f}%;background:{COLORS[k]}"></i>' for k in STACK)
    cells = "".join(f'<td class="num">{shares[label]:.1%}</td>' for label in LABELS)
    method = f"<td><b>{escape(name)}</b><br><small>{escape(learns_from)}</small></td>"
    return f'<tr{" class=strong" if strong else ""}>{method}{cells}<td><span class="bar">{bar}</span></td>{more}</tr>'


def _samples(samples: list[dict[str, str]]) -> str:
    def cell(text: str, label: str) -> str:
        return (
            f'<td><span class="tag" style="background:{COLORS[label]}">{label}</span> '
            f"{escape(text) or '<i>(nothing)</i>'}</td>"
        )

    rows = "".join(
        f"<tr><td>{escape(sample['prompt'])}</td>{cell(sample['before'], sample['before_label'])}"
        f"{cell(sample['after'], sample['after_label'])}</tr>"
        for sample in samples
    )
    return (
        '<div class="scroll"><table class="samples"><thead><tr><th>prompt</th><th>before</th><th>after D2O</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _plain_table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f'<tr><td>{escape(name)}</td><td class="num">{escape(value)}</td></tr>' for name, value in rows)
    return f"<table><tbody>{cells}</tbody></table>"


def _legend(colors: dict[str, str]) -> str:
    items = "".join(f'<span><i style="background:{color}"></i>{escape(name)}</span>' for name, color in colors.items())
    return f'<p class="legend">{items}</p>'


# --- Charts: plain SVG, in a box of 340 x 190 units -------------------------------------------------------------------

_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 190, 40, 8, 8, 24


def _method_panel(method: MethodResult) -> str:
    """Helpful, garbage and harmful over steps, stacked to 100%."""
    steps = [step for step, _ in method.curve]
    x, y = _scales(steps[-1], 0.0, 1.0)
    base = [0.0] * len(steps)
    areas = ""
    for label in STACK:
        top = [b + shares[label] for b, (_, shares) in zip(base, method.curve, strict=True)]
        edge = [(x(s), y(t)) for s, t in zip(steps, top, strict=True)]
        floor = [(x(s), y(b)) for s, b in zip(steps, base, strict=True)]
        areas += f'<polygon points="{_points(edge + floor[::-1])}" fill="{COLORS[label]}"/>'
        base = top
    axes = _axes(x, y, steps[-1], [(v, f"{v:.0%}") for v in (0.0, 0.25, 0.5, 0.75, 1.0)])
    return _figure(method.name, areas + axes)


def _training_charts(log: list[dict[str, Any]]) -> str:
    charts = [
        ("loss", {"loss": ("loss", "#3b5b92")}),
        ("margin (z, mean of the batch)", {"margin": ("rewards/margins", "#3b5b92")}),
        (
            "rewards",
            {"anchors": ("rewards/chosen", COLORS["helpful"]), "negative": ("rewards/rejected", COLORS["harmful"])},
        ),
    ]
    return "".join(_line_chart(title, log, lines) for title, lines in charts)


def _line_chart(title: str, log: list[dict[str, Any]], lines: dict[str, tuple[str, str]]) -> str:
    """One chart with ``lines``: name -> (key in the log, colour). The log must hold at least one of the keys."""
    series = {name: [(r["step"], float(r[key])) for r in log if key in r] for name, (key, _) in lines.items()}
    values = [value for points in series.values() for _, value in points]
    low, high = min(0.0, *values), max(0.0, *values)
    last = max(step for points in series.values() for step, _ in points)
    x, y = _scales(last, low, high)
    drawn = "".join(
        f'<polyline points="{_points([(x(s), y(v)) for s, v in series[name]])}" fill="none" stroke="{color}" '
        'stroke-width="1.6" stroke-linejoin="round"/>'
        for name, (_, color) in lines.items()
    )
    ticks = [(v, f"{v:.3g}") for v in _ticks(low, high)]
    legend = _legend({name: color for name, (_, color) in lines.items()}) if len(lines) > 1 else ""
    return _figure(title, _axes(x, y, last, ticks) + drawn, legend)


def _scales(last: int, low: float, high: float):  # type: ignore[no-untyped-def]
    height, span = _H - _TOP - _BOTTOM, (high - low) or 1.0
    return (
        lambda step: _LEFT + (_W - _LEFT - _RIGHT) * step / max(1, last),
        lambda value: _TOP + height * (high - value) / span,
    )


def _axes(x, y, last: int, ticks: list[tuple[float, str]]) -> str:  # type: ignore[no-untyped-def]
    out = ""
    for value, text in ticks:
        out += f'<line x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="gridline"/>'
        out += f'<text x="{_LEFT - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{text}</text>'
    for step in (0, last // 2, last):
        anchor = "start" if step == 0 else "end" if step == last else "middle"
        out += (
            f'<text x="{x(step):.1f}" y="{_H - 7}" text-anchor="{anchor}">{"step " if step == 0 else ""}{step}</text>'
        )
    return out


def _ticks(low: float, high: float) -> list[float]:
    """At most five round values within ``low`` to ``high``."""
    rough = ((high - low) or 1.0) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [k * size for k in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in points)


def _figure(title: str, body: str, legend: str = "") -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption>{legend}<svg viewBox="0 0 {_W} {_H}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg></figure>'
    )


_STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0;background:#f6f7f9;color:#1d2430;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 60px}
.kicker{margin:0;color:#667085;font-size:14px}h1{font-size:32px;line-height:1.2;margin:4px 0 14px}
h2{font-size:21px;margin:0 0 10px}.lead{font-size:18px;max-width:52em;margin:0 0 22px}
section{background:#fff;border:1px solid #e4e7ec;border-radius:12px;padding:24px;margin-top:22px}
section>p{max-width:60em}.note,footer{color:#667085;font-size:14px}footer{margin-top:26px}
.tiles{display:flex;gap:14px;flex-wrap:wrap}.tile{background:#fff;border:1px solid #e4e7ec;border-radius:12px;
padding:12px 22px;min-width:150px}.tile span{display:block;font-weight:600}.tile b{font-size:30px;line-height:1.2}
.tile i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:7px}
.tile small{display:block;color:#667085}
table{border-collapse:collapse;width:100%;font-size:15px}th{font-weight:600;text-align:left;color:#667085;font-size:13px;
vertical-align:bottom}td,th{padding:7px 12px 7px 0;border-bottom:1px solid #eceef2}tr:last-child td{border-bottom:0}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}tr.strong{background:#eef7f3}
tr.strong td:first-child{box-shadow:-8px 0 0 #eef7f3}small{color:#667085}.scroll{overflow-x:auto}
.results{min-width:940px}.results td:last-child{width:25%}.results td:first-child{width:14%}small{display:inline-block;
line-height:1.35}
.bar{display:flex;width:170px;height:14px;border-radius:4px;overflow:hidden}.bar i{display:block;height:100%}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:20px}figure{margin:0}
figcaption{font-weight:600;font-size:15px;margin-bottom:4px}svg{width:100%;height:auto;display:block}
svg text{font-size:10.5px;fill:#667085}.gridline{stroke:#1d2430;stroke-opacity:.12;stroke-width:1}
.legend{margin:0 0 10px;font-size:13px;color:#475467}.legend span{margin-right:16px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.tag{color:#fff;font-size:12px;border-radius:4px;padding:1px 7px;margin-right:4px}.samples td{vertical-align:top}
code{white-space:nowrap}pre{background:#f6f7f9;border-radius:8px;padding:14px;overflow-x:auto;font-size:13.5px;line-height:1.5}
.two{display:grid;grid-template-columns:1fr 1fr;gap:40px}@media(max-width:700px){.two{grid-template-columns:1fr}}
"""
