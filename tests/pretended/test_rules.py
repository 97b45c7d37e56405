"""Every rule on the device: the images of the CPU, and no more waits than the budget has."""

import pytest
import torch

from stepfuse.fuse.rules.registry import RULES as KNOWN
from tests.pretended.budget import GENERATORS, STEPS, check_budget, of_sampling, sampling_name
from tests.pretended.worlds import RULES, draw


@pytest.fixture(scope="module", params=RULES)
def rule(request, samplers):
    """The name of a rule, what it draws on the CPU in two steps, and on the device what `of_sampling` finds."""
    case = RULES[request.param]
    draw(samplers["cuda"], case, STEPS[0])  # fills caches
    found = {where: of_sampling(samplers["cuda"], case, kind) for where, kind in GENERATORS.items()}
    return request.param, draw(samplers["cpu"], case, STEPS[0]), found


def test_every_rule_is_among_them():
    assert {case.rule for case in RULES.values()} == set(KNOWN)


@pytest.mark.parametrize("where", GENERATORS)
def test_a_rule_draws_on_the_device_what_it_draws_on_the_cpu(rule, where):
    _, expected, found = rule
    _, latents = found[where]
    assert latents.device.type == "cuda"
    torch.testing.assert_close(latents.cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", GENERATORS)
def test_a_rule_makes_the_host_wait_as_often_as_the_budget_says(rule, where):
    name, _, found = rule
    measured, _ = found[where]
    check_budget(sampling_name(name, where), measured)
