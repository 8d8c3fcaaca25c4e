"""Memory of large results: reused, never shared, bounded, and as good as torch's own."""

import copy
import os
import pickle
import random
import subprocess
import sys
import threading

import pytest
import torch
from compiled import needs_library, poisoned

from crocuta.ops.kernels.library import library, switched_off
from crocuta.ops.kernels.memory import LARGE, empty, release

LIKE = torch.zeros(1)
STEP = LARGE // 4
"""float32 numbers of a large page."""


def keeps() -> bool:
    """Whether what is given back waits: not in a library with a sanitizer, and not on every system."""
    given_back = empty(LIKE, STEP)
    del given_back
    return release() > 0


pytestmark = [needs_library, pytest.mark.skipif(not keeps(), reason="this library keeps no memory")]


@pytest.fixture(autouse=True)
def _none_waits():
    release()
    yield
    release()


def test_the_next_tensor_of_a_size_gets_the_memory_of_the_last() -> None:
    first = empty(LIKE, 3, STEP)
    place = first.data_ptr()
    view = first[1:]
    del first
    assert empty(LIKE, 3, STEP).data_ptr() != place, "a view still uses it"
    assert release() == 3 * LARGE
    del view
    assert empty(LIKE, STEP - 1, 3).data_ptr() == place


def test_shapes_and_dtypes() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.uint8):
        for shape in ((LARGE,), (3, 5, STEP), (LARGE, 1, 2)):
            made = empty(LIKE, *shape, dtype=dtype)
            assert (made.dtype, made.shape, made.stride()) == (dtype, shape, torch.empty(shape, device="meta").stride())
            assert made.data_ptr() % LARGE == 0
            assert not made.requires_grad
    assert empty(LIKE.double(), 2, 3).dtype == torch.float64
    assert empty(LIKE, 0, STEP).shape == (0, STEP)
    assert empty(LIKE, 2, STEP, dtype=torch.int64).dtype == torch.int64, "a dtype that torch makes"


def test_tensors_in_use_never_share_memory() -> None:
    draw, held = random.Random(0), {}
    for turn in range(400):
        if held and draw.random() < 0.5:
            key = draw.choice(list(held))
            assert torch.equal(held.pop(key), torch.tensor(float(key)).expand(()).broadcast_to((STEP * (key % 5 + 1),)))
        else:
            held[turn] = empty(LIKE, STEP * (turn % 5 + 1)).fill_(turn)
    for key, tensor in held.items():
        assert bool((tensor == key).all())


def test_threads_share_it() -> None:
    faults = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for turn in range(60):
            tensor = empty(LIKE, STEP * draw.randint(1, 3))
            mark = float(seed * 1000 + turn)
            tensor.numpy().fill(mark)
            if not (tensor.numpy() == mark).all():
                faults.append((seed, turn))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not faults


def test_what_waits_and_what_is_used_is_bounded_by_what_was_used_at_once() -> None:
    small, large = STEP, 32 * STEP
    several = [empty(LIKE, small) for _ in range(4)]
    del several
    kept = empty(LIKE, large)  # now most was in use, and the small ones must go
    assert release() == 0
    del kept
    assert release() == 4 * large
    assert release() == 0


def test_what_waits_longest_goes_first() -> None:
    tensors = [empty(LIKE, pages * STEP) for pages in (4, 1, 8, 1, 12, 1)]
    between, place = tensors[1::2], tensors[4].data_ptr()
    waiting = tensors[::2]
    tensors.clear()
    while waiting:
        waiting.pop(0)
    larger = empty(LIKE, 13 * STEP)  # all of the first and of the second piece go, and a page of the third
    rest = empty(LIKE, 11 * STEP)
    assert rest.data_ptr() == place
    assert release() == 0
    del larger, rest, between
    assert release() == (13 + 11 + 3) * LARGE


def test_pieces_are_divided_and_whole_again() -> None:
    """Else a call that needs little and one that needs much would take turns at the system's expense."""
    large = empty(LIKE, 40 * STEP).fill_(1)
    place = large.data_ptr()
    del large
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]):
        parts = [empty(LIKE, pages * STEP) for pages in (10, 12, 18)]
        assert [part.data_ptr() - place for part in parts] == [0, 10 * LARGE, 22 * LARGE]
        held = dict(enumerate(parts))
        del parts
        for index in order:
            del held[index]
        whole = empty(LIKE, 40 * STEP)
        assert whole.data_ptr() == place
        assert whole.any(), "fresh memory, which is zero"
        del whole
    assert release() == 40 * LARGE


def test_the_smallest_piece_that_is_large_enough() -> None:
    tensors = [empty(LIKE, pages * STEP) for pages in (9, 1, 5, 1, 7, 1)]
    places = [tensor.data_ptr() for tensor in tensors]
    del tensors[4], tensors[2], tensors[0]
    found = [empty(LIKE, 6 * STEP), empty(LIKE, 5 * STEP), empty(LIKE, 8 * STEP)]
    assert [tensor.data_ptr() for tensor in found] == [places[4], places[2], places[0]]


def test_small_tensors_and_others_are_those_of_torch() -> None:
    assert library() is not None
    before = empty(LIKE, STEP)
    del before
    with switched_off():
        assert empty(LIKE, STEP).shape == (STEP,)
    meta = empty(LIKE.to("meta"), STEP)
    assert meta.device.type == "meta"
    with torch._subclasses.FakeTensorMode() as mode:
        fake = empty(mode.from_tensor(LIKE), STEP)
    assert isinstance(fake, torch._subclasses.FakeTensor)
    assert release() == LARGE, "none of them took it"


def test_memory_is_full_of_nan_where_torch_promises_it() -> None:
    with poisoned():
        assert empty(LIKE, STEP).isnan().all()


def test_more_than_there_is_is_the_error_of_torch() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        empty(LIKE, 1 << 45)
    assert empty(LIKE, STEP).fill_(1).sum() == STEP
    small = empty(LIKE, 4 * STEP)
    del small
    large = empty(LIKE, 32 * STEP)
    assert release() == 0, "the bound is as before"
    assert large.numel() == 32 * STEP


def test_gradients_inference_mode_and_copies() -> None:
    x = empty(LIKE, STEP).fill_(2).requires_grad_()
    (x * x).sum().backward()
    assert torch.equal(x.grad, torch.full((STEP,), 4.0))
    with torch.inference_mode():
        assert empty(LIKE, STEP).is_inference()
    x = empty(LIKE, STEP).fill_(3)
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), x.clone().share_memory_()):
        assert torch.equal(other, x)
        assert other.data_ptr() != x.data_ptr()
    place = x.data_ptr()
    shared = x.share_memory_()
    assert shared.is_shared()
    assert torch.equal(shared, torch.full((STEP,), 3.0))
    assert empty(LIKE, STEP).data_ptr() == place, "what is moved to shared memory gives its own back"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_fork_has_its_own() -> None:
    held = empty(LIKE, STEP).fill_(1)
    waiting = empty(LIKE, STEP)
    del waiting
    stop = threading.Event()

    def take_and_give() -> None:
        while not stop.is_set():
            empty(LIKE, STEP)

    busy = threading.Thread(target=take_and_give)
    busy.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:  # no products of torch here: its threads did not come along
                mine = empty(LIKE, STEP)
                mine.numpy().fill(7)
                held.numpy().fill(8)
                os._exit(0 if (mine.numpy() == 7).all() and mine.data_ptr() != held.data_ptr() else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        busy.join()
    assert bool((held == 1).all())


def test_tensors_may_outlive_everything() -> None:
    script = f"""
import sys, torch, threading
from crocuta.ops.kernels.memory import empty
held = empty(torch.zeros(1), {STEP}).fill_(1)
sys.modules["somewhere"] = held
torch.held = held[5:]
held.cycle = held
threading.Thread(target=lambda: empty(torch.zeros(1), {STEP})).start()
print("ended")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
