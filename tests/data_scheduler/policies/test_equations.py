"""Each policy against its paper's equation, with the arithmetic written out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from one_policy import context, policy, shares, trained

from data_scheduler.policies import Feedback, make_policy
from data_scheduler.policies.power_law import fit
from data_scheduler.policies.unimax import budgets
from headrace.errors import ConfigError


def test_proportional_is_the_size() -> None:
    # 20 + 100 + 1000 = 1120
    assert shares(policy("proportional")) == pytest.approx({"a": 20 / 1120, "b": 100 / 1120, "c": 1000 / 1120})
    # 80 + 400 = 480, c is switched off
    by_bytes = policy("proportional", {"a": 1.0, "b": 1.0, "c": 0.0}, by="bytes")
    assert shares(by_bytes) == pytest.approx({"a": 80 / 480, "b": 400 / 480})


def test_temperature_is_the_size_to_a_power() -> None:
    # τ = 2: √20, √100, √1000 = 4.4721, 10, 31.6228; sum 46.0949
    expected = {"a": 4.47214 / 46.09492, "b": 10 / 46.09492, "c": 31.62278 / 46.09492}
    assert shares(policy("temperature", temperature=2.0)) == pytest.approx(expected, rel=1e-5)


def test_unimax_gives_what_is_left_in_equal_parts() -> None:
    # C = 300, N = 2. a: min(300/3, 2·20 = 40) = 40. b: min(260/2, 200) = 130. c: min(130/1, 2000) = 130.
    assert budgets({"a": 20, "b": 100, "c": 1000}, 300, 2) == {"a": 40, "b": 130, "c": 130}
    # As the run: 100 steps of 3 tokens are 300.
    assert shares(policy("unimax", max_epochs=2.0)) == pytest.approx({"a": 40 / 300, "b": 130 / 300, "c": 130 / 300})
    # N = 1: a 20, b min(280/2, 100) = 100, c 180.
    assert shares(policy("unimax")) == pytest.approx({"a": 20 / 300, "b": 100 / 300, "c": 180 / 300})
    # Bytes, 4 a token: C = 1200 bytes, N = 2: a 160, b min(1040/2, 800) = 520, c 520.
    assert shares(policy("unimax", max_epochs=2.0, by="bytes")) == pytest.approx(
        {"a": 160 / 1200, "b": 520 / 1200, "c": 520 / 1200}
    )


def test_odm_is_exp3_with_a_moving_average_of_importance_weighted_losses() -> None:
    made = policy("odm", {"a": 1.0, "b": 1.0}, warmup_steps=0)
    # t = 1: E_1 = min(1/2, √(ln 2/2) = 0.5887) = 1/2, so π = (1 − 2·½)·… + ½.
    assert shares(made) == {"a": 0.5, "b": 0.5}
    # R̂_a = 0.9·0 + 0.1·4/0.5 = 0.8; R̂_b = 0.1·2/0.5 = 0.4. t = 2: E_2 = √(0.693147/4) = 0.416277, E_1 = 0.5.
    # softmax(0.5·0.8, 0.5·0.4) = (0.4, 0.2): e^0.2/(1 + e^0.2) = 1.221403/2.221403 = 0.549834.
    # π_a = (1 − 2·0.416277)·0.549834 + 0.416277 = 0.167446·0.549834 + 0.416277 = 0.508345
    assert shares(made, 1, trained(0, {"a": 4.0, "b": 2.0}, {"a": 0.5, "b": 0.5}))["a"] == pytest.approx(
        0.508345, abs=1e-6
    )
    # Only b was drawn, with share 0.25: R̂_a stays 0.8, R̂_b = 0.9·0.4 + 0.1·3/0.25 = 1.56.
    # t = 3: E_3 = √(0.693147/6) = 0.339889, E_2 = 0.416277; softmax difference 0.416277·0.76 = 0.316371:
    # b: e^0.316371 = 1.372139; 1.372139/2.372139 = 0.578440; π_b = 0.320222·0.578440 + 0.339889 = 0.525118
    assert shares(made, 2, trained(1, {"b": 3.0}, {"a": 0.75, "b": 0.25}))["b"] == pytest.approx(0.525118, abs=2e-6)


def test_odm_warms_up_for_one_percent_of_the_run() -> None:
    made = make_policy("odm", {}, {"a": 3.0, "b": 1.0}, context(names=("a", "b"), run_steps=300))
    report = {"a": 9.0, "b": 1.0}
    assert shares(made, 0, trained(0, report), trained(1, report)) == {"a": 0.75, "b": 0.25}
    assert shares(made, 1, trained(2, report))["a"] != 0.75


def test_doremi_weighs_by_excess_over_the_reference(tmp_path: Path) -> None:
    # The last two reports: a (2·1 + 3·3)/4 = 2.75, b (1 + 3)/2 = 2; the torn line and the evaluation do not count.
    lines = [
        {"step": 0, "source_loss": {"a": 9.0, "b": 9.0}, "source_tokens": {"a": 5, "b": 5}},
        {"step": 1, "source_loss": {"a": 2.0, "b": 1.0}, "source_tokens": {"a": 1, "b": 2}},
        {"step": 1, "val_loss": {"a": 0.0}},
        {"step": 2, "source_loss": {"a": 3.0, "b": 3.0}, "source_tokens": {"a": 3, "b": 2}},
        {"step": 3, "source_loss": {"a": "NaN"}, "source_tokens": {"a": 3}},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "sou')
    made = policy("doremi", {"a": 1.0, "b": 1.0}, reference=str(tmp_path), last=2, eta=1.0, smoothing=0.1)
    # λ_a = 3.75 − 2.75 = 1, λ_b = max(1.5 − 2, 0) = 0. α' = e/(1 + e) = 0.731059; α_a = 0.9·0.731059 + 0.05 = 0.707953
    assert shares(made, 1, trained(0, {"a": 3.75, "b": 1.5}))["a"] == pytest.approx(0.707953, abs=1e-6)
    # b alone: λ_b = 2.5 − 2 = 0.5, λ_a still 1. Ratio 0.707953·e^0.5 : 0.292047 = 1.167217 : 0.292047 → 0.799867
    # α_a = 0.9·0.799867 + 0.05 = 0.769880
    assert shares(made, 2, trained(1, {"b": 2.5}))["a"] == pytest.approx(0.769880, abs=1e-6)
    with pytest.raises(ConfigError, match="has no loss of c"):
        policy("doremi", reference=str(tmp_path))


def test_skill_it_sums_a_window_of_held_out_losses_through_the_graph() -> None:
    graph = {"a": {"b": 0.5}}
    made = policy("skill_it", {"a": 1.0, "b": 1.0}, graph=graph, eta=0.5, window=2, round_steps=10)
    # p_1: a 0.5·(1 + 0.5) = 0.75, b 0.5·1 = 0.5; e^0.25/(1 + e^0.25) = 0.562177
    assert shares(made)["a"] == pytest.approx(0.562177, abs=1e-6)

    def measured(step: int, a: float, b: float) -> Feedback:
        return Feedback(step, validation_loss={"a": a, "b": b})

    # Round 1, L = (2, 1): a 0.5·(2 + 0.5) = 1.25, b 0.5: e^0.75/(1 + e^0.75) = 0.679179
    assert shares(made, 2, measured(0, 2, 1))["a"] == pytest.approx(0.679179, abs=1e-6)
    # An evaluation that no round begins with is not one.
    assert shares(made, 7, measured(5, 9, 9))["a"] == pytest.approx(0.679179, abs=1e-6)
    # Rounds 1 and 2, sums (3, 3): a 0.5·(3 + 1.5) = 2.25, b 1.5: e^0.75 again.
    assert shares(made, 12, measured(10, 1, 2))["a"] == pytest.approx(0.679179, abs=1e-6)
    # Rounds 2 and 3, sums (1, 4): a 0.5·(1 + 2) = 1.5, b 2: 1/(1 + e^0.5) = 0.377541
    assert shares(made, 22, measured(20, 0, 2))["a"] == pytest.approx(0.377541, abs=1e-6)
    assert [step for step in range(31) if made.wants_validation(step)] == [0, 10, 20, 30]  # type: ignore[attr-defined]


def test_aioli_solves_for_the_law_and_follows_its_column_sums() -> None:
    made = policy(
        "aioli", {"a": 1.0, "b": 1.0}, eta=2.0, turn_steps=3, sweeps=1, round_steps=20, own_share=0.75, ema=None
    )
    first = shares(made, 0)
    order = "ab" if first["a"] > first["b"] else "ba"
    assert first[order[0]] == 0.75
    assert shares(made, 3)[order[1]] == 0.75
    assert shares(made, 6) == {"a": 0.5, "b": 0.5}  # measured, but heard of only `horizon` steps later
    # Drops in a's turn: L_a 0.5, L_b 0.2; in b's: L_a 0.1, L_b 0.4.
    # W = [[0.75, 0.25], [0.25, 0.75]], W⁻¹ = [[1.5, −0.5], [−0.5, 1.5]].
    # A_a = W⁻¹·(0.5, 0.1) = (0.7, −0.1); A_b = W⁻¹·(0.2, 0.4) = (0.1, 0.5).
    # Less the least entry, −0.1: (0.8, 0), (0.2, 0.6); divided by the sum 1.6: (0.5, 0), (0.125, 0.375).
    # Column sums a 0.625, b 0.375: p_a = 1/(1 + e^(−2·0.25)) = 0.622459
    drops = {"a": {"a": 0.5, "b": 0.2}, "b": {"a": 0.1, "b": 0.4}}
    losses, reports = {"a": 5.0, "b": 5.0}, []
    for turn in range(3):
        reports.append(Feedback(3 * turn, validation_loss=dict(losses)))
        if turn < 2:
            losses = {name: loss - drops[order[turn]][name] for name, loss in losses.items()}
    assert shares(made, 8, *reports)["a"] == pytest.approx(0.622459, abs=1e-6)
    assert [step for step in range(24) if made.wants_validation(step)] == [0, 3, 6, 20, 23]  # type: ignore[attr-defined]
    # A round with a missing measurement changes nothing.
    missing = [
        Feedback(20 + report.step, validation_loss=report.validation_loss) for report in (reports[0], reports[2])
    ]
    assert shares(made, 28, *missing)["a"] == pytest.approx(0.622459, abs=1e-6)


def test_a_power_law_is_found_again() -> None:
    tokens = [100.0 * (1 + number) for number in range(60)]
    law = fit(tokens, [1.5 + 20 * count**-0.4 for count in tokens])
    assert law.floor == pytest.approx(1.5, rel=2e-3)
    assert law.exponent == pytest.approx(0.4, rel=5e-3)
    # An outlier moves a robust fit little: −α(L − ε)/n at n = 6000 is −0.4·20·6000^−1.4 = −4.113e-5
    bent = [1.5 + 20 * count**-0.4 + (3.0 if number == 30 else 0.0) for number, count in enumerate(tokens)]
    assert fit(tokens, bent).slope(6000) == pytest.approx(-0.4 * 20 * 6000**-1.4, rel=0.02)
    # Rising losses have no positive scale: the floor is all there is.
    assert fit(tokens, [2 + number / 100 for number in range(60)]).slope(6000) == pytest.approx(0, abs=1e-12)


def test_ado_follows_the_forecast_learning_speed() -> None:
    made = policy("ado", {"a": 3.0, "b": 1.0}, refit_every=160, ignore_steps=40)
    assert shares(made) == {"a": 0.75, "b": 0.25}
    # Both report 512 tokens a step, so n grows by 1 sample a step for both: L_a = 2 + 5·n^−0.5, L_b = 3 + 2·n^−0.2.
    reports = []
    for step in range(160):
        n = step + 1.0
        losses = {"a": 2 + 5 * n**-0.5, "b": 3 + 2 * n**-0.2}
        reports.append(trained(step, losses, tokens=512))
    # Fitted after report 160, then one step of the recursions with t = 160. −dL/dn at 160:
    # a 0.5·5·160^−1.5 = 1.235e-3, b 0.2·2·160^−1.2 = 9.06e-4. h = μ, as nothing has moved before.
    speed = {"a": 0.5 * 5 * 160**-1.5, "b": 0.2 * 2 * 160**-1.2}
    wanted = {name: prior * math.sqrt(prior) * speed[name] for name, prior in (("a", 0.75), ("b", 0.25))}
    rho = wanted["a"] / sum(wanted.values())
    assert rho == pytest.approx(0.876, abs=1e-3)
    # π = 0.1·ρ + 0.9·π̄(0) with π̄(0) = μ
    assert shares(made, 162, *reports)["a"] == pytest.approx(0.1 * rho + 0.9 * 0.75, abs=2e-4)
    # t = 161: π̄ = ρ/161 + (1 − 1/161)·0.75; h_a = 0.1·π(160) + 0.9·0.75; n = 161
    pi, mean = 0.1 * rho + 0.9 * 0.75, rho / 161 + (1 - 1 / 161) * 0.75
    credit = 0.1 * pi + 0.9 * 0.75
    again = 0.75 * math.sqrt(credit) * speed["a"] * (160 / 161) ** 1.5
    other = 0.25 * math.sqrt(1 - credit) * speed["b"] * (160 / 161) ** 1.2
    expected = 0.1 * again / (again + other) + 0.9 * mean
    assert shares(made, 163, trained(160, {"a": 2.4, "b": 3.7}, tokens=512))["a"] == pytest.approx(expected, abs=2e-4)


def test_ado_holds_the_least_share() -> None:
    made = policy("ado", {"a": 1.0, "b": 1.0}, refit_every=100, ignore_steps=0, gamma2=1.0, least_share=0.2)
    reports = [trained(step, {"a": 2 + 5 / (step + 1), "b": 2.0}) for step in range(100)]
    # b does not learn at all: ρ_b = δ_min, and γ₂ = 1 makes π = ρ.
    assert shares(made, 102, *reports) == pytest.approx({"a": 0.8, "b": 0.2})


def test_mastery_lowers_what_lies_at_its_floor_and_takes_it_back_with_hysteresis() -> None:
    made = policy("mastery", refit_every=100, ignore_steps=0, at=0.02, until=0.05, keep=0.25)

    # a is at its floor of 1 after some steps (1 + 3·n^−2 in steps); b and c go on falling.
    def losses(step: int) -> dict[str, float]:
        n = step + 1.0
        return {"a": 1 + 3 * n**-2, "b": 1 + 4 * n**-0.3, "c": 1 + 4 * n**-0.3}

    assert shares(made, 0) == pytest.approx(dict.fromkeys("abc", 1 / 3))
    reports = [trained(step, losses(step)) for step in range(200)]
    # weights ¼·⅓ : ⅓ : ⅓ = 1 : 4 : 4
    assert shares(made, 202, *reports) == pytest.approx({"a": 1 / 9, "b": 4 / 9, "c": 4 / 9})
    # Smoothed loss s ← 0.95·s + 0.05·L. From s = 1: after one report of 1.8 it is 1.04: above 2 %, not above 5 %.
    assert shares(made, 203, trained(200, {"a": 1.8}))["a"] == pytest.approx(1 / 9)
    # One more: 0.95·1.04 + 0.05·1.8 = 1.078, past 5 %.
    assert shares(made, 204, trained(201, {"a": 1.8}))["a"] == pytest.approx(1 / 3)


def test_schedules_go_by_steps_tokens_or_shares_in_three_shapes() -> None:
    mixtures = {"early": {"a": 1.0}, "late": {"a": 1.0, "b": 3.0}}
    stages = [{"from_step": 0, "mixture": "early"}, {"from_step": 8, "mixture": "late"}]
    linear = policy("schedule", stages=stages, mixtures=mixtures, shape="linear")
    # b goes from 0 to 0.75 over 8 steps: at step 2 0.1875
    assert [shares(linear, step)["b"] for step in (0, 2, 8, 99)] == pytest.approx([0, 0.1875, 0.75, 0.75])
    cosine = policy("schedule", stages=stages, mixtures=mixtures, shape="cosine")
    # (1 − cos(π/4))/2 = 0.146447, of 0.75
    assert shares(cosine, 2)["b"] == pytest.approx(0.75 * 0.146447, abs=1e-6)
    constant = policy("schedule", stages=stages, mixtures=mixtures)
    assert [shares(constant, step)["b"] for step in (7, 8)] == [0, 0.75]
    # 3 tokens a step: 12 tokens are 4 steps; before them the configured weights.
    tokens = policy("schedule", stages=[{"from_tokens": 12, "weights": {"c": 2}}])
    assert [shares(tokens, step)["c"] for step in (3, 4)] == pytest.approx([1 / 3, 1])
    # Of 100 steps: 0.5 is step 50; from there linearly, to 1.0 of b at step 100: step 60 has a fifth.
    late = [{"from_share": 0.5, "weights": {"a": 1}, "shape": "linear"}, {"from_share": 1.0, "weights": {"b": 1}}]
    assert shares(policy("schedule", stages=late), 60)["b"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"from_step": 1}], "either mixture or weights"),
        ([{"from_step": 1, "weights": {"a": 1}, "wieghts": 1}], "no key 'wieghts'"),
        ([{"from_step": 1.5, "weights": {"a": 1}}], "step number from 0 on, got 1.5"),
        ([{"from_share": 2, "weights": {"a": 1}}], "0 to 1, got 2"),
        ([{"from_step": 5, "weights": {"a": 1}}, {"from_step": 5, "weights": {"a": 1}}], "does not come after 5"),
        ([{"from_step": 5, "weights": {"a": 1}}, {"from_share": 1, "weights": {"a": 1}}], "same unit"),
        ([{"from_step": 5, "weights": {"d": 1}}], "no source 'd'"),
        ([{"from_step": 5, "weights": {"a": 0}}], "positive weight"),
        ([{"from_step": 5, "mixture": "late"}], "no mixture 'late'"),
        ([{"from_step": 5, "weights": {"a": 1}, "shape": "round"}], "constant, linear or cosine"),
    ],
)
def test_mistakes_in_a_schedule_are_one_line(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        policy("schedule", stages=stages)
    assert "\n" not in str(caught.value)


def test_aioli_learns_nothing_from_turns_that_were_drawn_otherwise() -> None:
    def after(share: float) -> dict[str, float]:
        made = policy("aioli", {"a": 1.0, "b": 1.0}, turn_steps=1, sweeps=1, round_steps=8, ema=None)
        reports = [Feedback(step, validation_loss={"a": 3.0 - step**2 / 2, "b": 3.0}) for step in range(3)]
        drawn = shares(made, 1)
        changed = {name: value * share for name, value in drawn.items()}
        changed["a"] += 1 - sum(changed.values())
        reports[1] = Feedback(1, validation_loss=reports[1].validation_loss, shares=changed)
        return shares(made, 4, *reports)

    assert after(1.0)["a"] != 0.5
    assert after(0.9) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(("kind", "run_steps", "moves_by"), [("ado", 400, 120), ("mastery", 400, 120), ("ado", 60, 60)])
def test_short_runs_are_fitted_too(kind: str, run_steps: int, moves_by: int) -> None:
    """A tenth of the run is left out, and a fit made every tenth of it, once there are eight points to fit."""
    options = {"mean_of": 5} | ({"at": 0.05, "until": 0.06} if kind == "mastery" else {})
    made = make_policy(kind, options, {"a": 1.0, "b": 1.0}, context(names=("a", "b"), run_steps=run_steps))
    told = [trained(step, {"a": 2 + 5 / (step + 1), "b": 1 + 4 * (step + 1) ** -0.2}) for step in range(moves_by)]
    assert shares(made, 1, *told[: run_steps // 10])["a"] == 0.5
    assert shares(made, 2, *told[run_steps // 10 :])["a"] != 0.5
