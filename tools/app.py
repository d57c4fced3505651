"""The widgets of nbs/17_widgets.ipynb alone, as a page: tools/app.py [options of voila]

A visit is a process with the model in it (500 MB). It ends when its page is closed, and otherwise after three minutes in which no page is
connected to it (--MappingKernelManager.cull_idle_timeout=SECONDS). The page answers to the names of this machine only, so that no other
site can reach it under a name of its own, unless --Voila.ip opens it to the network; it loads nothing from elsewhere."""
import ipaddress, sys
from pathlib import Path
from jupyter_core.utils import ensure_async
from jupyter_server.base.handlers import APIHandler
from nbformat.v4 import new_code_cell
from tornado import web
from traitlets.config import Config
from voila.app import Voila

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT/'nbs'/'17_widgets.ipynb'
LARGEST = 64_000_000                                    # bytes of one message; the page itself refuses uploads above 9 MB

def only_app(req, notebook, cwd):
    "The cells tagged `app`, on the package instead of the lesson's own definitions"
    tagged = [c for c in notebook.cells if 'app' in c.metadata.get('tags', [])]
    notebook.cells = [new_code_cell('from unclip_nb.widgets import *'), *tagged]
    return notebook

class Goodbye(APIHandler):
    "The closing page's call. A beacon can't carry the token against forged requests; who calls must come from this page and know the kernel's id."
    def check_xsrf_cookie(self):
        if not self.check_origin():
            raise web.HTTPError(403)

    @web.authenticated
    async def post(self, kernel_id):
        if kernel_id in self.kernel_manager:
            await ensure_async(self.kernel_manager.shutdown_kernel(kernel_id))
        self.set_status(204)

def is_here(ip):
    "Whether an address that a server listens on is this machine's own."
    try:
        return ipaddress.ip_address(ip).is_loopback
    except ValueError:
        return ip == 'localhost'

class App(Voila):
    "Voilà with three mends: the host's name is checked, the closing call is heard, no style comes from a CDN."
    def setup_template_dirs(self):
        super().setup_template_dirs()
        self.template_paths.insert(0, str(Path(__file__).parent/'voila'))

    def init_settings(self):
        settings = super().init_settings()
        return settings | dict(allow_remote_access=not is_here(self.ip),
                               websocket_max_message_size=LARGEST)

    def init_handlers(self):
        goodbye = 'VoilaShutdownKernelHandler'
        return [(path, Goodbye if getattr(handler, '__name__', '') == goodbye else handler, *rest)
                for path, handler, *rest in super().init_handlers()]

if __name__ == '__main__':
    config = Config(VoilaConfiguration=dict(prelaunch_hook=only_app),
                    MappingKernelManager=dict(cull_idle_timeout=180,
                                              cull_interval=30,
                                              cull_connected=False))
    App.launch_instance([str(NOTEBOOK), *sys.argv[1:]], config=config)
