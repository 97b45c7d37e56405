"""Variance schedules: how random a step is, against closed forms and finite differences."""

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from stepfuse.fuse.diffusion.noise_path import FINAL, FlowPath, NoisePath
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import EtaSchedule, LearnedSchedule, TableSchedule, step_variance
from stepfuse.fuse.rules.schedules import schedule_from_dict, schedule_to_dict

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # Stable Diffusion's
PATHS = {
    "leading": lambda: DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False),
    "trailing": lambda: DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(),
    "shifted flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),  # Stable Diffusion 3's
}
X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def path_of(name):
    return NoisePath.from_scheduler(PATHS[name]())


def logit(p):
    return (p / (1 - p)).log()


# eta


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_eta_outside_the_unit_interval_is_refused(eta):
    builders = [
        lambda: EtaSchedule(eta=eta),
        lambda: TableSchedule(etas=(0.5, eta)),
        lambda: LearnedSchedule(offsets=torch.zeros(2), eta=eta),
    ]
    for build in builders:
        with pytest.raises(ValueError, match=r"expected a number in \[0, 1\]"):
            build()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eta_scales_the_standard_deviation(name, eta):
    path = path_of(name)
    for t, s in path.steps(10):
        v = step_variance(EtaSchedule(eta=eta), path, t, s, X)
        ancestral = step_variance(EtaSchedule(eta=1.0), path, t, s, X)
        torch.testing.assert_close(v.sqrt(), eta * ancestral.sqrt(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "schedule",
    [EtaSchedule(eta=0.3), TableSchedule(etas=(0.3, 0.7)), LearnedSchedule(offsets=torch.tensor([0.1, -0.2]), eta=0.3)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_have_the_variance_of_float32_ones(schedule, dtype):
    """0.3² rounded to bfloat16 is off by 1e-3: every log-probability would be, too."""
    path = path_of("leading")
    half = step_variance(schedule, path, 501, 401, X.to(dtype))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, step_variance(schedule, path, 501, 401, X.float()), rtol=1e-6, atol=0)


# table


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("count", [1, 7, 10, 28, 30, 50])
def test_a_table_of_as_many_entries_as_steps_gives_each_step_its_own(name, count):
    path, etas = path_of(name), tuple((k + 1) / (count + 1) for k in range(count))
    schedule = TableSchedule(etas=etas)
    taken = [schedule.relative(path, t, s, X).item() ** 0.5 for t, s in path.steps(count)]
    assert taken == pytest.approx(list(etas), rel=1e-12)


@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_a_table_follows_the_steps_of_an_image_size(mu):
    """The shift of FLUX.1 depends on the number of tokens: entries are of the steps, whatever their sigmas."""
    path = FlowPath(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), mu=mu)
    schedule = TableSchedule(etas=(0.2, 0.4, 0.6, 0.8))
    taken = [schedule.relative(path, t, s, X).item() ** 0.5 for t, s in path.steps(4)]
    assert taken == pytest.approx([0.2, 0.4, 0.6, 0.8], rel=1e-12)
    taken = [schedule.relative(path, t, s, X).item() ** 0.5 for t, s in path.steps(8)]
    assert taken == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8], rel=1e-12)


def test_a_short_table_is_shared_out_over_the_steps():
    path, schedule = path_of("trailing"), TableSchedule(etas=(0.9, 0.2))
    taken = [schedule.relative(path, t, s, X).item() ** 0.5 for t, s in path.steps(10)]
    assert taken == pytest.approx([0.9] * 5 + [0.2] * 5, rel=1e-12)


def test_a_table_asks_a_path_for_its_steps_once(monkeypatch):
    path, schedule, counts = path_of("trailing"), TableSchedule(etas=(0.9, 0.2)), []
    steps = type(path).steps
    monkeypatch.setattr(type(path), "steps", lambda self, count: counts.append(count) or steps(self, count))
    for t, s in ((999, 899), (499, 399)):
        schedule.relative(path, t, s, X)
    assert counts == [2]


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match="empty variance table"):
        TableSchedule(etas=())


# learned


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_learned_schedule_without_offsets_is_the_eta_schedule(name, dtype, eta):
    path, like = path_of(name), X.to(dtype)
    for t, s in path.steps(10):
        learned = step_variance(LearnedSchedule(offsets=torch.zeros(5), eta=eta), path, t, s, like)
        plain = step_variance(EtaSchedule(eta=eta), path, t, s, like)
        torch.testing.assert_close(learned, plain, rtol=1e-14 if dtype == torch.float64 else 1e-5, atol=0)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("offsets", [(-3.0, 2.0), (5.0, 0.5)])
def test_an_offset_shifts_the_logit_of_the_share_of_sigma_squared(name, offsets):
    """v / sigma_s² = E p / (1 - p + E p) says logit(v / sigma_s²) = logit(p) + log E."""
    path = path_of(name)
    schedule, plain = LearnedSchedule(offsets=torch.tensor(offsets), eta=0.8), EtaSchedule(eta=0.8)
    for t, s in path.steps(10)[:-1]:
        square = path.at(s, X)[1] ** 2
        shift = logit(step_variance(schedule, path, t, s, X) / square) - logit(
            step_variance(plain, path, t, s, X) / square
        )
        place = t if path.prediction_type == "flow" else t / 999
        expected = offsets[0] + (offsets[1] - offsets[0]) * place
        assert shift.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("t", "offset"), [(0, -1.0), (111, 0.0), (333, 2.0), (444, 1.5), (666, 0.5), (999, 1.0)])
def test_a_small_variance_is_scaled_by_the_exponential_of_the_offset(t, offset):
    """Knots at 0, 333, 666 and 999, straight lines between. With eta 0.001 the share of sigma_s² is below 1e-6."""
    path, s = path_of("leading"), max(t - 100, FINAL)
    learned = LearnedSchedule(offsets=torch.tensor([-1.0, 2.0, 0.5, 1.0]), eta=0.001)
    ratio = learned.relative(path, t, s, X) / EtaSchedule(eta=0.001).relative(path, t, s, X)
    assert ratio.item() == pytest.approx(math.exp(offset), rel=2e-5)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [10, 50, 250])
@pytest.mark.parametrize("offset", [50.0, -50.0])
def test_a_learned_variance_stays_where_a_transition_exists(name, dtype, count, offset):
    """Under sigma_s² but for rounding, also in steps so short that 1 - (alpha_t sigma_s / alpha_s sigma_t)² cancels."""
    path, like = path_of(name), X.to(dtype)
    schedule = LearnedSchedule(offsets=torch.full((3,), offset))
    for t, s in path.steps(count):
        v = step_variance(schedule, path, t, s, like)
        square = path.at(s, like)[1] ** 2
        assert (v <= square * (1 + (1e-6 if dtype == torch.float32 else 1e-12))).all(), (
            t,
            s,
            (v / square).max().item(),
        )
        transition(path, like, like, t, s, v)  # which checks its variance


@pytest.mark.parametrize("offset", [200.0, -200.0])
def test_offsets_beyond_the_range_of_float32_still_give_a_variance(offset):
    path, like = path_of("trailing"), X.float()
    schedule = LearnedSchedule(offsets=torch.full((2,), offset))
    for t, s in path.steps(10):
        v = step_variance(schedule, path, t, s, like)
        square = path.at(s, like)[1] ** 2
        torch.testing.assert_close(v, square if offset > 0 else torch.zeros_like(square), rtol=1e-5, atol=1e-30)


def central_difference(function, offsets, knot, h=2**-5):
    """Five points, error O(h⁴); h is a power of 2 so that offsets, kept in float32, move by exactly h."""

    def at(k):
        moved = offsets.clone()
        moved[knot] += k * h
        return function(moved).item()

    return (at(-2) - 8 * at(-1) + 8 * at(1) - at(2)) / (12 * h)


@pytest.mark.parametrize("quantity", ["variance", "mean", "draw", "log_prob"])
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_gradients_of_the_offsets_agree_with_finite_differences(name, quantity, eta):
    """At every step, the first (alpha_t = 0 for flow matching) and the last (sigma_s = 0) included."""
    path, prediction, x_s = path_of(name), X.flip(0), X.roll(1, 1)
    offsets = torch.tensor([-0.5, 0.25, 0.75])
    for t, s in path.steps(4):

        def function(offsets, t=t, s=s):
            v = step_variance(LearnedSchedule(offsets=offsets, eta=eta), path, t, s, X)
            gaussian = transition(path, X, prediction, t, s, v)
            match quantity:
                case "variance":
                    return v.sum()
                case "mean":
                    return (gaussian.mean * x_s).sum()
                case "draw":
                    return (gaussian.sample(torch.Generator().manual_seed(1)) * x_s).sum()
                case "log_prob":
                    return gaussian.log_prob(x_s).sum()

        if quantity == "log_prob" and not path.ancestral_variance(t, s, X).all():
            continue  # no density
        leaf = offsets.clone().requires_grad_()
        function(leaf).backward()
        for knot in range(3):
            expected = central_difference(function, offsets, knot)
            assert leaf.grad[knot].item() == pytest.approx(expected, rel=2e-5, abs=2e-6), (t, s, knot)


def test_an_offset_is_trained_by_the_density():
    """Draws with twice the variance: gradient ascent on their log-probability must find offset = log 2.

    Where p is small, v = exp(offset) · p sigma_s², so the likelihood's maximum is at the sample variance.
    """
    path, (t, s) = path_of("trailing"), (999, 899)
    count, eta = 20_000, 0.05
    mean = torch.zeros(count, 1, dtype=torch.float64)
    v = step_variance(EtaSchedule(eta=eta), path, t, s, mean).item()
    x_t = torch.zeros(count, 1, dtype=torch.float64)
    draws = (2 * v) ** 0.5 * torch.randn(count, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    offsets = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([offsets], lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        schedule = LearnedSchedule(offsets=offsets, eta=eta)
        variance = step_variance(schedule, path, t, s, x_t)
        loss = -transition(path, x_t, x_t, t, s, variance).log_prob(draws).mean()
        loss.backward()
        optimizer.step()
    # The sample variance has a relative standard error of sqrt(2 / n) = 0.01; p itself is 0.002.
    assert offsets[1].item() == pytest.approx(math.log(2), abs=0.05)
    assert offsets[0].item() == pytest.approx(0, abs=1e-6)  # t = 999 is the last knot's own


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0.0], "2 knots or more"),
        ([[0.0, 1.0]], "2 knots or more"),
        ([0.0, math.nan], "finite"),
        ([0.0, math.inf], "finite"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_offsets_that_are_no_schedule_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        LearnedSchedule(offsets=torch.tensor(offsets))


def test_a_learned_schedule_on_eta_zero_is_refused():
    with pytest.raises(ValueError, match="eta 0: there is no variance to scale"):
        LearnedSchedule(offsets=torch.zeros(2), eta=0.0)


@pytest.mark.parametrize(
    "schedule",
    [
        EtaSchedule(eta=0.4),
        TableSchedule(etas=(0.9, 0.5, 0.1)),
        LearnedSchedule(offsets=torch.tensor([-0.5, 0.25, 0.75]), eta=0.6),
    ],
)
def test_one_time_a_sample_equals_separate_calls(schedule):
    path, t, s = path_of("leading"), torch.tensor([981, 21]), torch.tensor([961, 1])
    together = step_variance(schedule, path, t, s, X)
    for row in range(2):
        alone = step_variance(schedule, path, int(t[row]), int(s[row]), X[[row]])
        torch.testing.assert_close(together[[row]], alone, rtol=1e-14, atol=0)


# JSON


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (EtaSchedule(eta=0.4), {"kind": "eta", "eta": 0.4}),
        (TableSchedule(etas=(0.9, 0.5)), {"kind": "table", "etas": [0.9, 0.5]}),
        (
            LearnedSchedule(offsets=torch.tensor([-0.5, 0.25]), eta=0.6),
            {"kind": "learned", "offsets": [-0.5, 0.25], "eta": 0.6},
        ),
    ],
)
def test_a_schedule_survives_json(schedule, values):
    assert schedule_to_dict(schedule) == values
    read = schedule_from_dict(json.loads(json.dumps(values)))
    assert type(read) is type(schedule)
    assert schedule_to_dict(read) == values
    path = path_of("leading")
    for t, s in path.steps(5):
        assert torch.equal(step_variance(read, path, t, s, X), step_variance(schedule, path, t, s, X))


def test_a_trained_schedule_can_be_written():
    schedule = LearnedSchedule(offsets=torch.tensor([-0.5, 0.25], requires_grad=True))
    assert schedule_to_dict(schedule)["offsets"] == [-0.5, 0.25]


@pytest.mark.parametrize("values", [{"kind": "cosine"}, {"eta": 0.4}, {}, "eta", None])
@pytest.mark.usefixtures("unchecked")
def test_an_unknown_kind_is_named(values):
    with pytest.raises(ValueError, match="expected a `kind` of eta, table, learned") as caught:
        schedule_from_dict(values)
    assert repr(values) in str(caught.value)


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="'eta' has no 'etas'; it has eta"):
        schedule_from_dict({"kind": "eta", "etas": [0.4]})


@pytest.mark.parametrize("values", [{"kind": "table"}, {"kind": "table", "etas": 3}, {"kind": "learned", "eta": 1.0}])
@pytest.mark.usefixtures("unchecked")
def test_a_missing_or_mistyped_field_is_a_value_error(values):
    with pytest.raises(ValueError, match="variance schedule"):
        schedule_from_dict(values)


def test_an_unlisted_schedule_cannot_be_written():
    class Own:
        def relative(self, path, t, s, like):
            return like

    with pytest.raises(ValueError, match="Own is not in SCHEDULES"):
        schedule_to_dict(Own())
