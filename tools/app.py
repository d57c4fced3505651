"The widgets of nbs/17_widgets.ipynb alone, as a page: tools/app.py [options of voila]"
import sys
from pathlib import Path
from nbformat.v4 import new_code_cell
from traitlets.config import Config
from voila.app import Voila

NOTEBOOK = Path(__file__).parent.parent/'nbs'/'17_widgets.ipynb'

def only_app(req, notebook, cwd):
    "The cells tagged `app`, on the package instead of the lesson's own definitions"
    notebook.cells = [new_code_cell('from unclip_nb.widgets import *')] + [c for c in notebook.cells if 'app' in c.metadata.get('tags', [])]
    return notebook

if __name__ == '__main__':
    Voila.launch_instance([str(NOTEBOOK), *sys.argv[1:]], config=Config(VoilaConfiguration=dict(prelaunch_hook=only_app)))
