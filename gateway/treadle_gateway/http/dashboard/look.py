"""Colours, spacing and the mark of all pages, for light and dark. Knows no page."""

from typing import Final

CSS: Final = """
:root { --ground:#f6f7f9; --card:#ffffff; --edge:#e3e6ec; --ink:#1c2333; --faint:#667085; }
.body--dark { --ground:#0f131b; --card:#181d28; --edge:#2a3140; --ink:#e6e9f0; --faint:#8a93a3; }
body { background:var(--ground) !important; color:var(--ink); font-family:Inter,system-ui,sans-serif; }
.nicegui-content { padding:0; gap:0; }
.page { max-width:1280px; width:100%; margin:0 auto; padding:20px 24px 48px; display:flex; flex-direction:column;
  gap:16px; box-sizing:border-box; }
.bar { background:var(--card) !important; color:var(--ink) !important; border-bottom:1px solid var(--edge);
  box-shadow:none !important; }
.bar .inner { max-width:1280px; width:100%; margin:0 auto; padding:0 8px; display:flex; align-items:center; gap:6px; }
.brand { font-weight:700; font-size:17px; letter-spacing:.01em; margin-right:14px; display:flex; gap:9px;
  align-items:center; color:var(--ink) !important; text-decoration:none; }
.nav { color:var(--faint) !important; text-decoration:none; padding:6px 11px; border-radius:7px; font-size:14px; }
.nav.here { background:rgba(59,130,246,.13); color:#3b82f6 !important; font-weight:600; }
.spacer { flex:1; }
.tenant { font-size:13px; color:var(--faint); padding-right:4px; }
.card { background:var(--card); border:1px solid var(--edge); border-radius:11px; padding:16px 18px;
  box-sizing:border-box; display:flex; flex-direction:column; gap:8px; min-width:0; width:100%; }
.card h3 { font-size:13px; font-weight:600; color:var(--faint); margin:0; line-height:1.3; letter-spacing:.02em; }
.title { font-size:21px; font-weight:650; line-height:1.25; }
.faint { color:var(--faint); font-size:13px; }
.mono { font-family:ui-monospace,SFMono-Regular,Menlo,monospace; font-size:12.5px; }
.grid { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr)); gap:16px; width:100%; }
.facts { display:flex; flex-wrap:wrap; gap:10px 30px; }
.fact { display:flex; flex-direction:column; }
.fact .k { font-size:12px; color:var(--faint); } .fact .v { font-size:14.5px; }
.line { display:flex; align-items:center; gap:10px; flex-wrap:wrap; width:100%; }
.status { font-size:12px; padding:2px 9px; border-radius:20px; font-weight:600; white-space:nowrap; }
.status.running { background:rgba(16,185,129,.16); color:#0f9f70; } .body--dark .status.running { color:#34d399; }
.status.finished { background:rgba(59,130,246,.15); color:#3b82f6; }
.status.interrupted, .status.stopped { background:rgba(230,159,0,.18); color:#b57a00; }
.body--dark .status.interrupted, .body--dark .status.stopped { color:#f5b73d; }
.status.diverged, .status.failed { background:rgba(220,60,60,.15); color:#dc4747; }
.status.idle, .status.new, .status.preparing { background:rgba(128,138,155,.17); color:var(--faint); }
.trouble { background:rgba(230,159,0,.18); border-radius:8px; padding:8px 14px; font-size:13.5px; width:100%;
  box-sizing:border-box; order:-1; }
.empty { padding:44px 16px; text-align:center; color:var(--faint); display:flex; flex-direction:column; gap:8px;
  align-items:center; width:100%; }
.sample { border:1px solid var(--edge); border-radius:8px; padding:10px 12px; width:100%; box-sizing:border-box; }
.sample pre { margin:2px 0 8px; white-space:pre-wrap; overflow-wrap:anywhere; font:inherit; font-size:13.5px; }
.sample pre:last-child { margin-bottom:0; }
.sample .k { font-size:11.5px; color:var(--faint); }
.q-table__card { background:transparent !important; color:var(--ink) !important; box-shadow:none !important; }
.q-table th { color:var(--faint); font-weight:600; } .runs tbody tr { cursor:pointer; }
.q-table thead tr, .q-table tbody td { border-color:var(--edge) !important; }
a.plain { color:#3b82f6; text-decoration:none; }
.narrow { max-width:430px; margin:9vh auto 0; padding:26px; gap:14px; }
.plain-page { margin:0; } .plain-page form { display:grid; gap:12px; }
.plain-page .field { font:inherit; padding:10px 12px; border:1px solid var(--edge); border-radius:8px;
  background:transparent; color:inherit; }
.plain-page .submit { font:inherit; font-weight:600; padding:10px; border:0; border-radius:8px; background:#3b82f6;
  color:#fff; cursor:pointer; }
@media (prefers-color-scheme: dark) {
  .plain-page { --ground:#0f131b; --card:#181d28; --edge:#2a3140; --ink:#e6e9f0; --faint:#8a93a3; }
}
"""
MARK: Final = (
    '<svg width="22" height="22" viewBox="0 0 32 32" fill="none" stroke-width="3.2" stroke-linecap="round">'
    '<path d="M4 11h24M4 21h24" stroke="#3b82f6"/><path d="M11 4v24M21 4v24" stroke="#e69f00"/></svg>'
)
