# SPDX-License-Identifier: Apache-2.0
"""The style of the page: light, dark, narrow, and on paper."""

STYLE = """
:root{--ink:#1b1f24;--soft:#57606a;--line:#d0d7de;--paper:#fff;--card:#f6f8fa;
--good:#116329;--bad:#a40e26;--claim:#7d4e00;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4ae;--line:#3d444d;
--paper:#0d1117;--card:#151b23;--good:#56d364;--bad:#ff7b72;--claim:#e3b341}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0 .6rem}
h2{font-size:1.25rem;margin:0;overflow-wrap:anywhere}
h3{font-size:1rem;margin:1.6rem 0 .5rem}
header p{margin:.2rem 0;color:var(--soft);overflow-wrap:anywhere}
.kind{text-transform:uppercase;letter-spacing:.08em;font-size:.8rem}
.use{margin:.1rem 0 1rem;color:var(--soft)}
.result{font-weight:600;margin:.1rem 0 1rem}
.result.good::before{content:"\\2713  "}.result.bad::before{content:"\\2717  "}
section>h3:first-child{margin-top:0}
.good{color:var(--good)}.bad{color:var(--bad)}.claim{color:var(--claim)}.open{color:var(--soft)}
section{margin-top:1.5rem;padding:1.25rem;border:1px solid var(--line);border-radius:.5rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
ul,ol{padding:0;margin:0;list-style:none}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.6rem;
margin-top:1.2rem}
.answers li{padding:.6rem .8rem;background:var(--card);border-left:.25rem solid currentColor;
border-radius:.25rem}
.answers b,.chain b{display:block;color:inherit;overflow-wrap:anywhere}
.answers span,.chain span{display:block;font-size:.875rem;color:var(--soft);overflow-wrap:anywhere}
.answers .good b::before{content:"\\2713  "}.answers .bad b::before{content:"\\2717  "}
.answers .claim b::before,.answers .open b::before{content:"?  "}
.limits li{padding-left:1.2rem;position:relative;margin:.25rem 0;overflow-wrap:anywhere}
.limits li::before{content:"\\2013";position:absolute;left:.2rem;color:var(--soft)}
.chain li{position:relative;padding:0 0 .9rem 1.6rem}
.chain li::before{content:"";position:absolute;left:.3rem;top:.45rem;width:.6rem;height:.6rem;
border-radius:50%;background:var(--good)}
.chain li::after{content:"";position:absolute;left:.56rem;top:1.1rem;bottom:-.4rem;
border-left:2px solid var(--line)}
.chain li:last-child::after{display:none}
table{width:100%;border-collapse:collapse;font-size:.875rem;table-layout:fixed}
th{text-align:left;color:var(--soft);font-weight:600}
th,td{padding:.35rem .5rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}
th:last-child,td:last-child{width:6rem}
@media(max-width:40rem){thead{display:none}tr{display:block;padding:.5rem 0;
border-bottom:1px solid var(--line)}td,td:last-child{display:grid;width:auto;
grid-template-columns:6rem 1fr;border:0;padding:.1rem 0}
td::before{content:attr(data-of);color:var(--soft)}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5rem}section{padding:1rem}}
@media print{:root{--ink:#000;--soft:#333;--line:#999;--paper:#fff;--card:#fff;--good:#000;
--bad:#000;--claim:#000}body{font-size:10pt}main{max-width:none;padding:0}
section{border:0;border-top:1px solid #000;border-radius:0;padding:.8rem 0}
.answers li,.chain,tr{break-inside:avoid}
@page{margin:1.5cm;@bottom-right{content:counter(page) " / " counter(pages);font-size:8pt}}
h2,h3{break-after:avoid}}
""".strip()
