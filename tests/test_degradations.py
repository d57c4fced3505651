"Gaussian blur against a plain loop in numpy and torchvision; the training corruption's randomness."
import math
import numpy as np, pytest, torch
from unclip_nb.core import UnclipError, generator
from unclip_nb.data import import_open_clip
from unclip_nb.degradations import blur_some, gaussian_blur, gaussian_kernel


def pictures(n=4, h=9, w=7): return torch.rand(n, 3, h, w, generator=generator("pictures"), dtype=torch.float64) * 2 - 1


def plain_blur(image, sigma, kernel):
    "Every pixel as a weighted sum over its neighbourhood, in loops."
    r, pad = kernel // 2, np.pad(image, [(0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2], mode="reflect")
    k = np.array([[math.exp(-(i * i + j * j) / (2 * sigma * sigma)) for j in range(-r, r + 1)] for i in range(-r, r + 1)]); k /= k.sum()
    return np.array([[[(pad[c, y:y + kernel, x:x + kernel] * k).sum() for x in range(image.shape[2])] for y in range(image.shape[1])] for c in range(3)])


@pytest.mark.parametrize("sigma, kernel", [(0.6, 3), (1.2, 5), (2.0, 7)])
def test_blur_equals_a_plain_loop(sigma, kernel):
    x = pictures(2)
    want = torch.from_numpy(np.stack([plain_blur(i.numpy(), sigma, kernel) for i in x]))
    assert torch.allclose(gaussian_blur(x, sigma, kernel), want, atol=1e-10)


def test_the_default_is_the_papers():
    x = pictures(1)
    assert torch.allclose(gaussian_blur(x)[0], torch.from_numpy(plain_blur(x[0].numpy(), 0.6, 3)), atol=1e-10)


@pytest.mark.parametrize("sigma, kernel", [(0.6, 3), (1.5, 5)])
def test_blur_equals_torchvision(sigma, kernel):
    import_open_clip()                                                        # makes torchvision load beside any torch
    from torchvision.transforms.functional import gaussian_blur as theirs
    x = pictures().float()
    assert torch.allclose(gaussian_blur(x, sigma, kernel), theirs(x, [kernel, kernel], [sigma, sigma]), atol=1e-6)


def test_each_picture_has_its_own_sigma():
    x, sigmas = pictures(), torch.tensor([0.0, 0.3, 0.6, 1.5])
    together = gaussian_blur(x, sigmas)
    for i, s in enumerate(sigmas.tolist()): assert torch.allclose(together[i:i + 1], gaussian_blur(x[i:i + 1], s), atol=1e-6)
    assert torch.equal(together[0], x[0])                                     # sigma 0 changes nothing


def test_kernels_add_up_and_flat_pictures_stay_flat():
    k = gaussian_kernel(torch.tensor([0.0, 0.6, 5.0], dtype=torch.float64), 5)
    assert torch.allclose(k.sum(1), torch.ones(3, dtype=torch.float64)) and torch.equal(k, k.flip(1)) and k[0].tolist() == [0, 0, 1, 0, 0]
    flat = torch.full((2, 3, 6, 6), 0.7)
    assert torch.allclose(gaussian_blur(flat, 3.0, 5), flat)                  # also at the border


def test_dtype_device_and_gradient_are_kept():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = pictures().to(dtype); assert gaussian_blur(x, 0.6).dtype == dtype and blur_some(x, 0.5, generator("g")).dtype == dtype
    x = pictures().requires_grad_(); gaussian_blur(x).sum().backward()
    assert torch.isclose(x.grad.sum(), torch.tensor(float(x.numel()), dtype=torch.float64))


def test_blur_some_blurs_that_share_and_leaves_the_others_alone():
    x = pictures(400, 5, 5)
    y, blurred = blur_some(x, 0.25, generator("some")), gaussian_blur(x)
    same, soft = [(y == z).flatten(1).all(1) for z in (x, blurred)]
    assert (same ^ soft).all() and 0.18 < soft.float().mean() < 0.32
    assert torch.equal(blur_some(x, 0.0, generator("g")), x) and torch.equal(blur_some(x, 1.0, generator("g")), blurred)


def test_blur_some_is_a_function_of_its_generator():
    x, g, h = pictures(50), generator("a"), generator("a")
    assert torch.equal(blur_some(x, 0.5, g, (0.3, 0.9)), blur_some(x, 0.5, h, (0.3, 0.9)))
    blur_some(x, 0.0, g); blur_some(x, 1.0, h)
    assert torch.equal(g.get_state(), h.get_state())                          # takes the same draws, whatever p
    assert not torch.equal(blur_some(x, 0.5, generator("b")), blur_some(x, 0.5, generator("c")))


def test_a_range_of_sigmas_draws_within_it():
    edge = torch.zeros(500, 1, 5, 5, dtype=torch.float64); edge[:, :, 2, 2] = 1
    middle = blur_some(edge, 1.0, generator("range"), (0.4, 0.8))[:, 0, 2, 2]
    low, high = [gaussian_blur(edge[:1], s)[0, 0, 2, 2] for s in (0.8, 0.4)]
    assert (middle >= low - 1e-6).all() and (middle <= high + 1e-6).all() and middle.std() > 0.05


@pytest.mark.parametrize("wrong, says", [
    (lambda x: gaussian_blur(x, 0.6, 4), "odd"), (lambda x: gaussian_blur(x, -1.0), "sigma"), (lambda x: gaussian_blur(x, 0.6, 15), "too large"),
])
def test_mistakes_are_named(wrong, says):
    with pytest.raises(UnclipError, match=says) as e: wrong(pictures())
    assert "\n" not in str(e.value)


def test_a_wrong_number_of_sigmas_is_named():
    with pytest.raises(Exception, match="sigma"): gaussian_blur(pictures(4), torch.ones(3))    # ours, or the type checker's


def test_which_and_how_much_are_drawn_apart():
    dot = torch.zeros(500, 1, 5, 5, dtype=torch.float64); dot[:, :, 2, 2] = 1
    middle = blur_some(dot, 0.5, generator("apart"), (0.4, 0.8))[:, 0, 2, 2]
    blurred, strongest = middle[middle < 1], gaussian_blur(dot[:1], 0.75)[0, 0, 2, 2]
    assert 200 < len(blurred) < 300 and (blurred < strongest).sum() > 10      # strong blurs too, not only those with a small draw
