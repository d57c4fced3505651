"One thread, no network, no bars: notebooks then print the same numbers here, in the tests and on the reader's machine."
import os
from pathlib import Path

CALM = dict(OMP_NUM_THREADS='1',
            MKL_NUM_THREADS='1',
            TOKENIZERS_PARALLELISM='false',
            HF_HUB_OFFLINE='1',
            HF_DATASETS_OFFLINE='1',
            HF_DATASETS_DISABLE_PROGRESS_BARS='1',
            HF_HUB_DISABLE_PROGRESS_BARS='1',
            HF_HUB_DISABLE_TELEMETRY='1',
            MATPLOTLIBRC=str(Path(__file__).parent.parent / 'nbs' / 'matplotlibrc'))
for k, v in CALM.items():
    os.environ.setdefault(k, v)
