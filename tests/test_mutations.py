"""The mutations are sources by text: each must still be there, once, to be broken."""

import pytest

from tests.engine import (
    mutate_async,
    mutate_beams,
    mutate_cascade,
    mutate_grammars,
    mutate_plans,
    mutate_sharing,
    mutate_steps,
    mutate_weights,
)
from tests.kernels import (
    mutate_ampere,
    mutate_blackwell,
    mutate_cache,
    mutate_cpu,
    mutate_decode,
    mutate_prefill,
)
from tests.mutations import ROOT

PROGRAMS = (
    mutate_sharing,
    mutate_beams,
    mutate_steps,
    mutate_cascade,
    mutate_grammars,
    mutate_async,
    mutate_plans,
    mutate_weights,
    mutate_decode,
    mutate_prefill,
    mutate_ampere,
    mutate_blackwell,
    mutate_cache,
    mutate_cpu,
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_every_source_is_there_once(program):
    for name, mutation in program.MUTATIONS.items():
        assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, name
        assert mutation.old != mutation.new, name
        for test in mutation.tests.split():
            assert (ROOT / test.split("::")[0]).exists(), name
