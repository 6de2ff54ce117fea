"""The schedule and the two samplers equal the published ones on analytic noise predictions."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2i.diffusion import Schedule, ancestral, dpm_solver
from d2i.diffusion.schedulers import run_scheduler
from d2i.errors import ConfigError
from tests.golden.analytic import analytic_eps
from tests.golden.arrays import max_distance, tensors
from tests.shared import needs_shared

# diffusers' schedulers speak to numpy in an old way.
pytestmark = [
    needs_shared,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

NUM_STEPS = (5, 10, 20, 25, 48, 49, 50)
EPS_NAMES = ("gmm", "linear")


@pytest.mark.parametrize("table", ["betas", "alphas", "cum_alphas", "cum_betas", "snr"])
def test_noise_schedule_matches_golden(table: str) -> None:
    expected = tensors("schedule")[table].numpy()
    np.testing.assert_allclose(getattr(Schedule(), table), expected, rtol=1e-12, atol=0)


def test_log_alpha_is_linear_between_integer_times() -> None:
    schedule = Schedule()
    for n in (1, 500, 1000):
        assert schedule.log_alpha(n) == pytest.approx(0.5 * np.log(schedule.cum_alphas[n]))
    middle = (schedule.log_alpha(20) + schedule.log_alpha(21)) / 2
    assert schedule.log_alpha(20.5) == pytest.approx(middle, rel=1e-12)


@pytest.mark.parametrize("name", EPS_NAMES)
def test_analytic_noise_predictions_match_golden(name: str) -> None:
    golden = tensors("sampler")
    found = analytic_eps(name)(golden["eps_check_x"], golden["eps_check_n"])
    assert max_distance(found, golden[f"eps_check_{name}"]) < 1e-12


@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("name", EPS_NAMES)
def test_dpm_solver_matches_golden(name: str, num_steps: int) -> None:
    golden, eps = tensors("sampler"), analytic_eps(name)
    x = golden["x_T"]
    double = dpm_solver(eps, x.double(), num_steps)
    assert max_distance(double, golden[f"dpm_{name}_{num_steps}_fp64"]) < 1e-10
    single = dpm_solver(eps, x.float(), num_steps)
    assert single.dtype == torch.float32
    assert max_distance(single, golden[f"dpm_{name}_{num_steps}_fp32"]) < 2e-5


@pytest.mark.parametrize("num_steps", [20, 50])
@pytest.mark.parametrize("name", EPS_NAMES)
def test_dpm_solver_calls_network_at_published_times_and_states(name: str, num_steps: int) -> None:
    golden, eps = tensors("sampler"), analytic_eps(name)
    calls: list[tuple[Tensor, Tensor]] = []

    def recorded(x: Tensor, n: Tensor) -> Tensor:
        calls.append((x, n))
        return eps(x, n)

    dpm_solver(recorded, golden["x_T"].double(), num_steps)
    times = torch.stack([n for _, n in calls])
    assert times.shape == (num_steps, 6)
    expected = golden[f"dpm_{name}_{num_steps}_call_n"][:, None].expand_as(times)
    assert max_distance(times, expected) < 1e-9
    if num_steps == 50:
        states = torch.stack([x for x, _ in calls]).float()
        assert max_distance(states, golden[f"dpm_{name}_50_call_x"]) < 2e-6


@pytest.mark.parametrize("num_steps", [20, 50])
@pytest.mark.parametrize("name", EPS_NAMES)
def test_dpm_solver_states_match_golden_after_every_update(name: str, num_steps: int) -> None:
    golden, eps = tensors("sampler"), analytic_eps(name)
    states: list[Tensor] = []

    def recorded(x: Tensor, n: Tensor) -> Tensor:
        states.append(x)
        return eps(x, n)

    states.append(dpm_solver(recorded, golden["x_T"].double(), num_steps))
    # An update of order k takes k evaluations, the first of them at the state it starts from.
    ends = golden[f"dpm_{name}_{num_steps}_update_order"].cumsum(0)
    assert int(ends[-1]) == num_steps
    found = torch.stack([states[int(end)] for end in ends])
    assert max_distance(found, golden[f"dpm_{name}_{num_steps}_update_state"]) < 1e-10
    if num_steps == 50:
        grid = torch.cat([golden[f"dpm_{name}_50_call_n"], torch.ones(1)])
        starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
        assert max_distance(grid[starts], golden[f"dpm_{name}_50_update_n_from"]) < 1e-9
        assert max_distance(grid[ends], golden[f"dpm_{name}_50_update_n_to"]) < 1e-9


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6])
def test_dpm_solver_calls_network_once_per_step(num_steps: int) -> None:
    calls: list[float] = []

    def recorded(x: Tensor, n: Tensor) -> Tensor:
        calls.append(float(n[0]))
        return x

    dpm_solver(recorded, torch.ones(1, 2), num_steps)
    assert len(calls) == num_steps
    assert calls[0] == 1000.0


def test_dpm_solver_rejects_zero_steps() -> None:
    with pytest.raises(ConfigError, match="num_steps is 0"):
        dpm_solver(lambda x, _: x, torch.ones(1, 2), 0)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("name", EPS_NAMES)
def test_ancestral_sampler_matches_golden(name: str, variance: Any) -> None:
    golden, eps = tensors("ancestral"), analytic_eps(name)
    kept: dict[int, Tensor] = {}

    def recorded(x: Tensor, n: Tensor) -> Tensor:
        kept[int(n[0])] = x
        return eps(x, n)

    kept[0] = ancestral(recorded, golden["x_T"], golden["z"], variance)
    assert max_distance(kept[0], golden[f"ddpm_{name}_{variance}"]) < 1e-10
    for n, state in zip(
        golden["keep_n"].tolist(), golden[f"ddpm_{name}_{variance}_states"], strict=True
    ):
        assert max_distance(kept[n], state) < 1e-10


def test_ancestral_sampler_rejects_other_variance() -> None:
    variance: Any = "learned"
    with pytest.raises(ConfigError, match="variance is 'learned'"):
        ancestral(lambda x, _: x, torch.ones(1, 2), torch.ones(1000, 1, 2), variance)


def test_add_noise_is_identity_at_zero() -> None:
    x0, eps = torch.randn(2, 3), torch.randn(2, 3)
    noised = Schedule().add_noise(x0, eps, torch.tensor([0, 1000]))
    assert torch.equal(noised[0], x0[0])
    assert float(Schedule().cum_alphas[1000]) < 0.005


@pytest.mark.parametrize(("name", "tolerance"), [("gmm", 4e-4), ("linear", 6e-4)])
def test_diffusers_scheduler_matches_dpm_solver_at_published_times(
    name: str, tolerance: float
) -> None:
    golden, eps = tensors("sampler"), analytic_eps(name)
    expected = golden[f"dpm_{name}_50_fp64"]
    found = run_scheduler(eps, golden["x_T"].float(), 50, "DPMSolverSinglestepScheduler")
    assert max_distance(found.double(), expected) < tolerance

    def a_step_early(x: Tensor, n: Tensor) -> Tensor:
        return eps(x, n - 1)

    # What asking at diffusers' t instead of n = t + 1 would give is ten times as far away.
    found = run_scheduler(a_step_early, golden["x_T"].float(), 50, "DPMSolverSinglestepScheduler")
    assert max_distance(found.double(), expected) > 10 * tolerance


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
)
@pytest.mark.parametrize("name", EPS_NAMES)
def test_diffusers_schedulers_converge_to_exact_solution(name: str, scheduler: str) -> None:
    golden, eps = tensors("sampler"), analytic_eps(name)
    exact = dpm_solver(eps, golden["x_T"].double(), 600)
    distances = [
        max_distance(run_scheduler(eps, golden["x_T"].float(), steps, scheduler).double(), exact)
        for steps in (10, 50)
    ]
    assert distances[1] < min(0.15, distances[0])


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_scheduler_noise_is_keyed_by_sample(scheduler: str) -> None:
    golden, eps = tensors("sampler"), analytic_eps("gmm")
    x = golden["x_T"].float()
    whole = run_scheduler(eps, x, 10, scheduler, [3, 1, 4, 1, 5, 9])
    part = run_scheduler(eps, x[2:4], 10, scheduler, [4, 1])
    assert max_distance(part, whole[2:4]) < 1e-6
    assert max_distance(run_scheduler(eps, x[2:4], 10, scheduler, [2, 1])[1], part[1]) < 1e-6
    assert max_distance(run_scheduler(eps, x[2:4], 10, scheduler, [2, 1])[0], part[0]) > 0.1


def test_stochastic_scheduler_matches_distribution_of_paper_algorithm() -> None:
    eps = analytic_eps("linear")
    torch.manual_seed(0)
    x = torch.randn(64, 4, 4, 4, dtype=torch.float64)
    expected = ancestral(eps, x, [torch.randn_like(x) for _ in range(999)], "posterior")
    found = run_scheduler(eps, x, 1000, "DDPMScheduler", list(range(64)))
    assert float(found.mean()) == pytest.approx(float(expected.mean()), abs=0.08)
    assert float(found.std()) == pytest.approx(float(expected.std()), rel=0.06)


@pytest.mark.parametrize(
    "name", ["NoScheduler", "FlowMatchEulerDiscreteScheduler", "UnCLIPScheduler", "UNet2DModel"]
)
def test_scheduler_with_other_prediction_type_raises(name: str) -> None:
    with pytest.raises(ConfigError, match=f"diffusers:{name}"):
        run_scheduler(lambda x, _: x, torch.ones(1, 2), 5, name)
