"""The look of report.html, for light and dark."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #5b6470; --grid: #e6e9ed; --edge: #d9dde3;
  --good: #1a7f4b; --good-bg: #e2f5ea; --mid: #8a6100; --mid-bg: #fdf1d3; --bad: #a8321f; --bad-bg: #fce6e2;
  --c0: #2f6fde; --c1: #e07b1a; --c2: #1f9d77; --c3: #b0489b; --c4: #7a5fd0; --c5: #c2452d; --c6: #3a9ab8;
  --c7: #8a8f1d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1c2026; --ink: #e6e9ed; --soft: #9aa4b0; --grid: #2a3038; --edge: #343b44;
    --good: #6fd6a0; --good-bg: #17382a; --mid: #e9c46a; --mid-bg: #3a2f12; --bad: #f2937f; --bad-bg: #43211b;
    --c0: #6ea0ff; --c1: #f2a154; --c2: #4cc9a0; --c3: #d982c7; --c4: #a893f0; --c5: #ef7f6a; --c6: #6cc3de;
    --c7: #c3c84f;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 14px; margin: 0; font-weight: 600; }
a { color: var(--c0); }
.sub { color: var(--soft); margin: 4px 0 0; }
.head { display: flex; align-items: center; gap: 12px; flex-wrap: wrap; }
.card.below { margin-top: 14px; }
.pill { border-radius: 999px; padding: 2px 12px; font-size: 13px; font-weight: 600; }
.good { color: var(--good); background: var(--good-bg); }
.mid { color: var(--mid); background: var(--mid-bg); }
.bad { color: var(--bad); background: var(--bad-bg); }
.none { color: var(--soft); background: var(--grid); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px;
  margin-top: 20px; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 14px 16px; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 21px; white-space: nowrap; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile .more { color: var(--soft); font-size: 12.5px; }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; align-items: start; }
.three { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 14px; }
@media (max-width: 860px) { .two, .three { grid-template-columns: minmax(0, 1fr); } }
.note { color: var(--soft); font-size: 13px; margin: 6px 0; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; color: var(--soft); font-size: 13px;
  margin: 4px 0 0; }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; background: currentColor; }
.key.faint { opacity: .35; }
svg.chart { display: block; width: 100%; height: auto; margin-top: 6px; overflow: visible; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
svg .tick { fill: var(--soft); font-variant-numeric: tabular-nums; }
.three svg .tick { font-size: 17px; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--edge); }
svg .line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
svg .line.faint { stroke-width: 1.25; opacity: .5; }
svg .dot, svg .fill { fill: currentColor; } svg .dot { stroke: var(--card); stroke-width: 1.5; }
svg .dot.faint { opacity: .4; }
svg .fill.thin { opacity: .75; }
svg .hit { fill: transparent; } svg .tip { visibility: hidden; pointer-events: none; }
svg .at:hover .tip { visibility: visible; }
svg .rule { stroke: var(--soft); stroke-dasharray: 3 3; }
svg .box { fill: var(--card); stroke: var(--edge); }
svg .row { fill: var(--grid); opacity: .55; }
svg .inbar { fill: #fff; font-weight: 600; pointer-events: none; }
@media (prefers-color-scheme: dark) { svg .inbar { fill: #14171b; } }
svg .bar:hover .fill { stroke: var(--ink); stroke-width: 1.5; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: 13px; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
td.num, th.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bars { width: 38%; padding-right: 0; vertical-align: middle; }
.meter { height: 9px; border-radius: 3px; background: currentColor; min-width: 2px; }
.meter.hollow { background: none; border: 1.5px solid var(--soft); margin-top: 3px; }
.group { margin-top: 12px; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; font-weight: 600; }
.answer { color: var(--soft); font-size: 13px; margin: 2px 0 6px; overflow-wrap: anywhere; }
.sample { display: grid; grid-template-columns: 58px minmax(0, 1fr) auto; gap: 10px; padding: 5px 0;
  border-top: 1px solid var(--grid); align-items: start; }
.chip { border-radius: 6px; padding: 1px 7px; font-size: 13px; font-weight: 600; text-align: center;
  font-variant-numeric: tabular-nums; }
.said { white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.end { color: var(--soft); font-size: 12px; text-align: right; white-space: nowrap; }
details > summary { cursor: pointer; color: var(--soft); padding: 4px 0; }
details[open] > summary { margin-bottom: 8px; }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 0; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.drawing { background: #fff; border-radius: 8px; padding: 8px; text-align: center; }
.drawing img { max-width: 100%; height: auto; }
.below.card:first-child { margin-top: 0; }
.trouble { border-left: 4px solid var(--mid); }
.failed { border-left: 4px solid var(--bad); }
.failed pre { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 6px; }
ul { margin: 6px 0; padding-left: 20px; }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""
