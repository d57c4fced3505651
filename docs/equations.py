"""Every equation of the built pages through the MathJax that the pages load: a reader's red error ends the build.

MathJax runs in the node that the package playwright brings along; no browser is needed. By hand: python docs/equations.py _docs/html"""
import json, re, subprocess, sys
from html import unescape
from importlib.util import find_spec
from pathlib import Path

MATH = re.compile(r'<(div|span) class="math notranslate[^"]*"[^>]*>(.*?)</\1>', re.S)
TAGS = re.compile(r'<span class="eqno">.*?</span>', re.S)
WALK = r"""
const folder = process.argv[1];
const settings = {loader: {load: ['input/tex', 'output/chtml', 'adaptors/liteDOM']},
                  tex: {packages: {'[-]': ['noundefined']}}};          // an unknown command is an error
require(folder + '/node-main.js').init(settings).then(async MathJax => {
  const said = [];
  for (const [tex, display] of JSON.parse(require('fs').readFileSync(0))) {
    const html = MathJax.startup.adaptor.outerHTML(await MathJax.tex2chtmlPromise(tex, {display}));
    said.push((html.match(/data-mjx-error="([^"]*)"/) || [, ''])[1]);
  }
  console.log(JSON.stringify(said));
}).catch(error => { console.error(error); process.exit(1); });
"""

def equations(page):
    "(tex, whether it stands on a line of its own) of a page's HTML, as MathJax will find them."
    for kind, text in MATH.findall(page):
        tex = unescape(TAGS.sub('', text)).strip()
        yield re.sub(r'^\\[\[(]|\\[\])]$', '', tex), kind == 'div'

def errors(formulas):
    "What MathJax says of each (tex, display): '' where it is content."
    formulas = list(formulas)
    if not formulas:
        return []
    node = Path(find_spec('playwright').origin).parent / 'driver' / ('node.exe' if sys.platform
                                                                     == 'win32' else 'node')
    mathjax = Path(find_spec('sphinx-mathjax-offline').origin).parent/'static'/'mathjax'
    run = subprocess.run([node, '-e', WALK, mathjax],
                         input=json.dumps(formulas),
                         capture_output=True,
                         text=True,
                         encoding='utf-8',
                         timeout=300)
    if run.returncode:
        raise RuntimeError(f'MathJax did not run: {run.stderr[-500:]}')
    return json.loads(run.stdout)

def broken(folder):
    "(page, tex, error) of every equation of the built pages that a reader would see in red; how many there are in all."
    found = [(p.relative_to(folder).as_posix(), *equation)
             for p in sorted(Path(folder).rglob('*.html')) if '_modules' not in p.parts
             for equation in equations(p.read_text('utf-8'))]
    said = errors([equation for _, *equation in found])
    return [(page, tex, error) for (page, tex, _), error in zip(found, said) if error], len(found)

def report(folder):
    "The broken equations in lines for a person; '' if there are none."
    bad, n = broken(folder)
    lines = [f'{page}: {error}\n    {" ".join(tex.split())[:200]}' for page, tex, error in bad]
    return '\n'.join([f'{len(bad)} of {n} equations do not render:', *lines]) if bad else ''

if __name__ == '__main__':
    sys.exit(report(sys.argv[1]) or 0)
