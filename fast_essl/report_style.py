"""The report's style sheet: one column of text, colours for eight runs, a light and a dark face."""

NUM_COLORS = 8

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6675; --faint: #e3e6eb; --paper: #fbfaf8; --card: #ffffff;
  --random: #a9b0ba; --c0: #c2703d; --c1: #14746f; --c2: #5a57a6; --c3: #a13d63; --c4: #3a78b5; --c5: #7d7a2b;
  --c6: #8a5a44; --c7: #4d8c57; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #9aa4b4; --faint: #2d3440; --paper: #14171c;
  --card: #1b1f26; --random: #6d7582; --c0: #e2955f; --c1: #43b8a8; --c2: #9a97e6; --c3: #e07fa3; --c4: #76b1e8;
  --c5: #bdb95a; --c6: #c79a80; --c7: #82c48d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 56px 24px 80px; }
header { max-width: 820px; }
.eyebrow { margin: 0 0 10px; color: var(--c1); font-size: 14px; font-weight: 600; letter-spacing: .06em; }
h1 { margin: 0 0 16px; font-size: clamp(27px, 4.6vw, 44px); line-height: 1.16; letter-spacing: -.02em; font-weight: 680;
  text-wrap: balance; }
.lead { margin: 0 0 8px; font-size: 19px; }
.facts, .note { color: var(--soft); font-size: 15px; margin: 0; }
section { margin-top: 52px; }
h2 { margin: 0 0 16px; font-size: 22px; letter-spacing: -.01em; }
.note { margin-top: 14px; max-width: 72ch; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--faint); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 11px 16px; text-align: right; white-space: nowrap; font-weight: 400; }
thead th { color: var(--soft); font-size: 14px; padding-bottom: 6px; }
tbody tr { border-top: 1px solid var(--faint); }
tbody th { text-align: left; font-weight: 560; }
.accuracy td, .accuracy thead th { text-align: left; min-width: 108px; }
.value { display: block; font-size: 20px; line-height: 1.2; }
.best { font-weight: 700; }
.bar { display: block; height: 5px; border-radius: 3px; margin-top: 6px;
  background: linear-gradient(to right, var(--color) var(--share), var(--faint) 0); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 10px;
  background: var(--color); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 18px; }
figure { margin: 0; padding: 14px 14px 8px; background: var(--card); border: 1px solid var(--faint);
  border-radius: 10px; }
figcaption { font-weight: 600; font-size: 16px; margin: 0 0 4px 4px; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
.grid { stroke: var(--faint); }
.level { stroke: var(--random); stroke-width: 1.5; stroke-dasharray: 4 4; }
.curve { fill: none; stroke: var(--color); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg text { fill: var(--soft); }
circle, svg text.name { fill: var(--color); }
svg .name { font-weight: 650; font-size: 12.5px; paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.views { width: auto; min-width: 100%; }
.views th, .views td { padding: 5px 6px; text-align: center; }
.views tbody th { padding-left: 16px; padding-right: 12px; }
.views tbody tr { border: 0; }
.views tr > :nth-child(3), .views tr > :nth-child(5) { padding-left: 22px; }
.views tr > :last-child { padding-right: 16px; }
.views img { display: block; width: clamp(42px, 9vw, 100px); aspect-ratio: 1; border-radius: 5px;
  image-rendering: pixelated; margin: 0 auto; }
pre { overflow-x: auto; margin: 8px 0 20px; padding: 14px 16px; background: var(--card); border: 1px solid var(--faint);
  border-radius: 10px; font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; padding: 6px 0; }
@media (max-width: 560px) { main { padding: 32px 16px 56px; } .lead { font-size: 17px; } section { margin-top: 40px; }
  th, td { padding: 9px 11px; } }
.random { --color: var(--random); }
.run0 { --color: var(--c0); } .run1 { --color: var(--c1); } .run2 { --color: var(--c2); } .run3 { --color: var(--c3); }
.run4 { --color: var(--c4); } .run5 { --color: var(--c5); } .run6 { --color: var(--c6); } .run7 { --color: var(--c7); }
"""
