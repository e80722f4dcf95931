"""Fixtures. Every registered architecture runs in every test that asks for `model` (of a test's many cases some run a share:
`pytest --cases all` runs all); shapes and types are checked by jaxtyping and beartype while the tests run."""

from __future__ import annotations

import os

# What tests run in processes of their own inherits it: beside the other workers' more threads wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import shapes

shapes.install()

import copy  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

import gatedlens as gl  # noqa: E402
from gatedlens.hooks import architectures  # noqa: E402
from tests.helpers import example  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile("gatedlens", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("gatedlens")


def there(hooked):
    """Whether the installed transformers has the classes that an architecture wraps: the oldest that we support lacks some."""
    try:
        hooked.tiny()
    except ImportError as error:
        if "from 'transformers'" not in str(error):
            raise
        return False
    return True


def has_a_state(hooked):
    """Whether an architecture is a recurrence at all: LFM2 has convolutions in its place, and tests of its own."""
    return any(row.name.endswith("state") for row in hooked.block_points)


EVERY = {name: hooked for name, hooked in architectures().items() if has_a_state(hooked) and there(hooked)}
LANGUAGE = {name: hooked for name, hooked in EVERY.items() if issubclass(hooked, gl.HookedLanguageModel)}
ERASING = {
    name: hooked for name, hooked in LANGUAGE.items() if "mixer.hook_erase" in {row.name for row in hooked.block_points}
}
ROOT = Path(__file__).parent.parent


# -- how many cases of a test an architecture runs --------------------------------------------------------------------

# Every architecture runs every test. Of a test's many cases (methods, points, sides of padding, ...) it runs a share, another
# than the next architecture's, so that together they run all: the papers' architectures and Mamba-2 one case in two, each
# other one in four. `pytest --cases all` runs all of all, `--cases papers` all of the papers' alone.
PAPERS = ("griffin", "mamba", "mamba2", "rwkv", "vim")
SHARE = {**dict.fromkeys(EVERY, 4), **dict.fromkeys(PAPERS, 2)}


def pytest_addoption(parser):
    parser.addoption(
        "--cases", choices=("all", "dealt", "papers"), default="dealt", help="how many of general tests' cases run"
    )


def pytest_collection_modifyitems(config, items):
    cases_of = config.getoption("--cases")
    turns, cases, dealt = list(EVERY), {}, set()
    for item in items:
        name = architecture_of(item)
        if name in EVERY:
            cases.setdefault((item.module.__name__, item.function.__name__, name), []).append(item)
    for (*_, name), mine in cases.items():
        if cases_of == "dealt":
            step = min(SHARE[name], len(mine))
            dealt.update(item for number, item in enumerate(mine) if (number + turns.index(name)) % step)
        elif cases_of == "papers" and name not in PAPERS:
            dealt.update(mine)
    config.hook.pytest_deselected(items=[item for item in items if item in dealt])
    items[:] = sorted(
        (item for item in items if item not in dealt), key=lambda item: item.get_closest_marker("slow") is not None
    )


def architecture_of(item):
    """Which architecture a general test is of: that of its fixture."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("hooked", params.get("_language_model"))


@pytest.fixture(params=list(EVERY), scope="session")
def hooked(request):
    """Each architecture's class."""
    return EVERY[request.param]


@pytest.fixture(scope="session")
def _model(hooked):
    return hooked.tiny(seed=0, dtype=torch.float64)


@pytest.fixture
def model(_model):
    """Each architecture's tiny model in float64; the test fails if it leaves hooks or changed parameters behind."""
    before = copy.deepcopy({name: p.detach() for name, p in _model.wrapped.named_parameters()})
    yield _model
    assert not _model.list_hooks(), "the test left hooks on the model"
    for name, p in _model.wrapped.named_parameters():
        assert torch.equal(before[name], p), f"{name} was changed"
        assert p.grad is None, f"{name} has a gradient"


@pytest.fixture
def clean(model):
    """The cache of every point, lazy ones too, on `example(model)`."""
    with torch.no_grad():
        return model.run_with_cache(example(model), names_filter=lambda name: True)[1]


@pytest.fixture(params=list(LANGUAGE), scope="session")
def _language_model(request):
    return LANGUAGE[request.param].tiny(seed=0, dtype=torch.float64)


@pytest.fixture
def lm(_language_model):
    """Each language architecture's tiny model in float64."""
    yield _language_model
    assert not _language_model.list_hooks(), "the test left hooks on the model"


@pytest.fixture(params=list(ERASING), scope="session")
def _erasing(request):
    return ERASING[request.param].tiny(seed=0, dtype=torch.float64)


@pytest.fixture
def erasing(_erasing):
    """The tiny model, in float64, of each architecture with a delta rule."""
    yield _erasing
    assert not _erasing.list_hooks(), "the test left hooks on the model"


@pytest.fixture(scope="session")
def recall_model():
    """The bundled in-context model, float32."""
    return gl.from_pretrained("gatedlens/mamba-recall", device="cpu")


@pytest.fixture(scope="session")
def moby_model():
    """The bundled byte-level model, float32."""
    return gl.from_pretrained("gatedlens/mamba-moby", device="cpu")
