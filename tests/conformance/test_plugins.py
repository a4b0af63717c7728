import pytest

from prunelm.allocators import ALLOCATORS
from prunelm.criteria import CRITERIA
from prunelm.reconstructions import RECONSTRUCTIONS
from prunelm.sites import find_sites
from prunelm.testing import check_allocator, check_criterion, check_reconstruction, tiny_model

MODELS = ["llama", "gpt2", "phi3", "bert"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_criterion(name, model):
    sites = ["attention"] if "similarity" in CRITERIA[name].needs() else ["attention", "ffn"]
    for site_name in sites:
        check_criterion(name, lambda: tiny_model(model), site_name=site_name, equivariant=name != "random")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", ["exact", "gaussian", "identity"])
@pytest.mark.parametrize("gated", ["single-norm", "paper"])
def test_forms_of_the_second_moment(model, form, gated):
    for site_name in ("attention", "ffn"):
        check_criterion("second-moment", lambda: tiny_model(model), site_name=site_name, form=form, gated=gated)


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_allocator(name, model, multiple_of):
    check_allocator(name, find_sites(tiny_model(model)), multiple_of=multiple_of)


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
def test_allocator_with_query_heads_as_units(name):
    check_allocator(name, find_sites(tiny_model("llama"), "query"), min_units=1)


@pytest.mark.parametrize("name", sorted(RECONSTRUCTIONS))
def test_reconstruction(name):
    check_reconstruction(name)
