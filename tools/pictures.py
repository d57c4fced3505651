"How far two pictures are apart for somebody who looks at both from across the room."
import base64, io
import numpy as np
from PIL import Image

KINDS = ('image/png', 'image/jpeg')
SIDE = 32                                               # what is compared: 32 x 32 averages of colour
BOUND = 0.015                                           # fresh runs stay below 0.009 (most of it: the 64 colours of stored plots), other pictures are above 0.02

def opened(data):
    "A picture of an output as 32 x 32 colours in [0, 1], and its size."
    with Image.open(io.BytesIO(base64.b64decode(''.join(data)))) as image:
        seen = Image.new('RGBA', image.size, 'white')
        seen.alpha_composite(image.convert('RGBA'))
        return np.asarray(seen.convert('RGB').resize(
            (SIDE, SIDE), Image.BOX), dtype=np.float32) / 255, image.size

def distance(stored, fresh):
    "The root mean square difference of the two at 32 x 32; infinite where their shapes differ by more than a line of text."
    (a, (w, h)), (b, (v, g)) = opened(stored), opened(fresh)
    if abs(w / h - v / g) > 0.1 * w / h:
        return float('inf')
    return float(np.sqrt(((a - b) ** 2).mean()))

def shown(outputs):
    "The pictures of a cell in their order, each as {kind: data}: one picture may come as PNG and as JPEG."
    found = [{kind: o.get('data', {})[kind]
              for kind in KINDS if kind in o.get('data', {})} for o in outputs]
    return [kinds for kinds in found if kinds]

def changed(stored, fresh):
    "One line on the first picture of a cell that is another one than stored; '' if there is none."
    old, new = shown(stored), shown(fresh)
    if len(old) != len(new):
        return f'{len(old)} pictures are stored, {len(new)} are drawn'
    for k, (a, b) in enumerate(zip(old, new), 1):
        kind = next((kind for kind in KINDS if kind in a and kind in b), None)
        if kind is None:
            return f'picture {k} is stored as {next(iter(a))}, drawn as {next(iter(b))}'
        far = distance(a[kind], b[kind])
        if far > BOUND:
            return f'picture {k} is another one than stored: {far:.3f} apart at {SIDE} x {SIDE}, {BOUND} allowed; run tools/nbrun.py and look'
    return ''
