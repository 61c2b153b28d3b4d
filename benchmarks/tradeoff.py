"""Compare predicted with measured time to a loss: does the report put effective batches in the right order?

    python benchmarks/tradeoff.py [--quick] [--json PATH] [--markdown PATH]

The task is scikit-learn's digits, each sample augmented again every time, and a small network trained with SGD. Measured: updates
until the held-out loss is below a target, with the learning rate tuned at every batch, times the CPU seconds of an
update. Predicted: the report of `autobatch.find` and of one training at one batch with its noise scale.
All learning rates and seeds of a batch train side by side, as one batched matrix product.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pages import machine, renew, table
from scipy.stats import kendalltau
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import autobatch
from autobatch._memory.host import HostProbe
from autobatch._report.tradeoff import Costs
from autobatch.report import NoiseRange

WIDTHS = (64, 96, 96, 10)
TRAINED = 1257  # originals; the rest is held out
MOMENTUM = 0.9
WARM_UP = 10  # updates
BASE_RATE, BASE_BATCH = 0.15, 128  # of the linear rule, in the middle of each grid
MOST_RATE = 0.4  # end of the rule: no batch trains faster beyond it
SPACING = 1.035  # from one look at the held-out loss to the next
GOAL = 0.10  # extra time of the recommended batch, median over seeds
MICRO = 32  # the most samples of a micro-batch in the layout that accumulates
NOISE_PLAN = autobatch.BatchPlan(MICRO, 4)  # of the training that is watched


@dataclass(frozen=True)
class Size:
    """Extent of the benchmark."""

    batches: tuple[int, ...]
    targets: tuple[float, ...]  # held-out losses
    seeds: int
    rates: int  # learning rates per batch, a factor of √2 apart
    pool: int  # augmented training samples
    noise_updates: int
    timed: int  # updates of each plan

    def grid(self, batch):
        middle = min(BASE_RATE * batch / BASE_BATCH, MOST_RATE)
        half = self.rates // 2
        return [middle * 2 ** (step / 2) for step in range(-half, self.rates - half)]


FULL = Size(tuple(2**k for k in range(3, 11)), (0.8, 0.65, 0.55), 5, 7, 200_000, 400, 100)
QUICK = Size(tuple(2**k for k in range(4, 9)), (0.8,), 2, 3, 20_000, 400, 20)

# Samples at once: all of a batch, or 32 at most and the rest by accumulating
WHOLE, ACCUMULATED = "one micro-batch", f"at most {MICRO} at once"


def plan_of(layout, batch):
    if layout == WHOLE:
        return autobatch.BatchPlan(batch, 1)
    return autobatch.BatchPlan(min(batch, MICRO), max(1, batch // MICRO))


LAYOUTS = (WHOLE, ACCUMULATED)
AFTER = "noise scale, reading ok"
EARLY = "noise scale, first 50 updates"


# Data


def augmented(images, generator):
    """The images turned, scaled, sheared, shifted, and with noise."""
    count = len(images)

    def uniform(most):
        return (2 * torch.rand(count, generator=generator) - 1) * most

    turn, shear, scale = uniform(0.2), uniform(0.1), 1 + uniform(0.1)
    rows = [
        torch.stack([scale * turn.cos(), -turn.sin() + shear, uniform(0.15)], 1),
        torch.stack([turn.sin(), scale * turn.cos(), uniform(0.15)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), (count, 1, 8, 8), align_corners=False)
    moved = F.grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False)
    noise = torch.randn(moved.shape, generator=generator)
    return (moved + 0.2 * noise).view(count, 64)


@dataclass(frozen=True)
class Data:
    x: torch.Tensor
    y: torch.Tensor
    held_x: torch.Tensor
    held_y: torch.Tensor

    @classmethod
    def of(cls, pool):
        images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
        images = images.float() / 16
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(images), generator=generator)
        train, held = order[:TRAINED], order[TRAINED:].repeat(2)
        drawn = train[torch.randint(TRAINED, (pool,), generator=generator)]
        return cls(
            augmented(images[drawn], generator),
            labels[drawn],
            augmented(images[held], generator),
            labels[held],
        )

    def stream(self, seed, batch):
        """Batches of samples without end, none twice before all have been seen."""
        generator = torch.Generator().manual_seed(1000 + seed)
        while True:
            order = torch.randperm(len(self.x), generator=generator)
            for at in range(0, len(order) - batch + 1, batch):
                chosen = order[at : at + batch]
                yield self.x[chosen], self.y[chosen]


# Updates to a loss, measured


def network(seed):
    torch.manual_seed(seed)
    layers = []
    for wide, narrow in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Networks:
    """As many networks as there are seeds and learning rates; the rates of a seed share its samples and its start."""

    def __init__(self, seeds, rates):
        self.shape = (seeds, len(rates))
        self.rates = torch.tensor(rates).repeat(seeds).view(-1, 1, 1)
        self.parameters = []
        for of_seeds in zip(*(network(s).parameters() for s in range(seeds)), strict=True):
            each = torch.stack([p.detach() for p in of_seeds])
            each = each.repeat_interleave(len(rates), 0)
            each = each.transpose(1, 2) if each.ndim == 3 else each.unsqueeze(1)
            self.parameters.append(each.contiguous().requires_grad_())
        self.momenta = [torch.zeros_like(p) for p in self.parameters]
        self.updates = 0

    def losses(self, x, y):
        """Of each network, the mean; of (seeds, batch, ...), or of the same samples for all."""
        of_each = self.shape[1] if len(x) > 1 else self.shape[0] * self.shape[1]
        x, y = x.repeat_interleave(of_each, 0), y.repeat_interleave(of_each, 0)
        *hidden, (weight, bias) = zip(self.parameters[::2], self.parameters[1::2], strict=True)
        for w, b in hidden:
            x = torch.baddbmm(b, x, w).relu()
        logits = torch.baddbmm(bias, x, weight)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        return loss.view(len(x), -1).mean(1)

    def update(self, x, y):
        gradients = torch.autograd.grad(self.losses(x, y).sum(), self.parameters)
        self.updates += 1
        rates = self.rates * min(1.0, self.updates / WARM_UP)
        with torch.no_grad():
            for p, momentum, g in zip(self.parameters, self.momenta, gradients, strict=True):
                momentum.mul_(MOMENTUM).add_(g)
                p.sub_(rates * momentum)


@dataclass(frozen=True)
class Reached:
    """Updates to a target at one batch."""

    rate: float
    is_at_edge: bool  # of the grid of learning rates
    updates: list[int]  # of each seed


def updates_to(size, data, batch):
    """For each target, with the learning rate whose median seed reaches it first."""
    rates = size.grid(batch)
    networks = Networks(size.seeds, rates)
    streams = [data.stream(seed, batch) for seed in range(size.seeds)]
    looks, found = [], {}
    reached = {t: np.full(networks.shape, np.inf) for t in size.targets}
    look = 5
    most = 60 * (30 + 40_000 // batch)
    while len(found) < len(size.targets) and networks.updates < most:
        networks.update(*map(torch.stack, zip(*map(next, streams), strict=True)))
        if networks.updates < look:
            continue
        look = max(look + 1, round(look * SPACING))
        with torch.no_grad():
            now = networks.losses(data.held_x[None], data.held_y[None])
        looks = [*looks[-2:], now.view(networks.shape).numpy()]
        mean = np.nan_to_num(np.mean(looks, 0), nan=np.inf)
        for target in size.targets:
            is_new = (mean < target) & np.isinf(reached[target]) & (len(looks) == 3)
            reached[target][is_new] = networks.updates
            middle = np.median(reached[target], 0)
            best = int(np.argmin(middle))
            if np.isfinite(reached[target][:, best]).all() and target not in found:
                found[target] = Reached(
                    rates[best],
                    best in {0, len(rates) - 1},
                    reached[target][:, best].astype(int).tolist(),
                )
    if len(found) < len(size.targets):
        raise SystemExit(f"A batch of {batch} did not reach {size.targets[-1]}.")
    return found


# Seconds of an update


def training(data, model, rate, seed):
    """The training loop that is timed and watched, as `autobatch.find` takes it."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=MOMENTUM)

    def train(batch_size, accumulate):
        samples = data.stream(seed, batch_size)
        updates = 0
        while True:
            updates += 1
            optimizer.param_groups[0]["lr"] = rate * min(1.0, updates / WARM_UP)
            for _ in range(accumulate):
                x, y = next(samples)
                (F.cross_entropy(model(x), y) / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    return train


def update_seconds(size, data):
    """Median CPU seconds of an update of each plan, timed in turns."""
    plans = {plan_of(layout, batch) for layout in LAYOUTS for batch in size.batches}
    loops, taken = {}, {plan: [] for plan in plans}
    for plan in plans:
        loops[plan] = training(data, network(0), 1e-3, 0)(
            plan.micro_batch_size, plan.accumulate_grad_batches
        )
        next(loops[plan])
    for _ in range(size.timed):
        for plan, loop in loops.items():
            next(loop)  # the caches are its own again
            began = time.process_time()
            next(loop)
            taken[plan].append(time.process_time() - began)
    return {plan: statistics.median(seconds) for plan, seconds in taken.items()}


# Prediction


class OnCpuTime(HostProbe):
    """This machine, on the clock that everything here is measured by: other programs do not move it."""

    def clock(self):
        return time.process_time()


def paces(size, data):
    """Return step times of two reports: every batch at once, and at most a few samples at once."""
    wishes = {
        WHOLE: (size.batches[-1],) * 2,
        ACCUMULATED: (MICRO, NOISE_PLAN.effective_batch_size),
    }
    return {
        layout: autobatch.find(
            training(data, network(0), 1e-3, 0),
            max_micro_batch_size=most,
            target_batch_size=target,
            device=OnCpuTime(),
        ).pace
        for layout, (most, target) in wishes.items()
    }


@dataclass(frozen=True)
class Noise:
    """Noise scale of one training, in samples."""

    state: str
    reading: float
    early: float  # of the first 50 updates


def first_windows(watch):
    """The noise scale that a report would show, did it not wait for the first updates to pass."""
    assert watch.reading.state == "settling"
    windows = watch._record._windows  # noqa: SLF001 -- a reading shows nothing so early
    return sum(w.noise for w in windows) / sum(w.signal for w in windows)


def noise(size, data, rate, seed):
    model = network(seed)
    plan = NOISE_PLAN
    loop = training(data, model, rate, seed)(plan.micro_batch_size, plan.accumulate_grad_batches)
    with autobatch.noise_scale(model, micro_batch_size=MICRO) as watch:
        for _ in range(50):
            next(loop)
        early = first_windows(watch)
        for _ in range(size.noise_updates - 50):
            next(loop)
    return Noise(watch.reading.state, watch.reading.samples, early)


def relative_times(pace, plans, samples):
    """Of each plan, as the report works them out."""
    reading = autobatch.NoiseReading("ok", samples, samples, samples)
    plan = plans[0]  # the reference does not change the order
    costs = Costs(plan, pace, None, NoiseRange.of(reading), None)
    return [costs.row(plan).relative_time for plan in plans]


# Comparison


@dataclass(frozen=True)
class Verdict:
    """Result of one way to choose, over the seeds of one case."""

    layout: str
    target: float
    choice: str
    batches: list[int]
    extra_times: list[float]  # over the best batch of the ladder, 0.1 is 10 %
    extra_by_median: list[
        float
    ]  # the same, of the times of the median seed: less of a seed's luck is in them
    taus: list[float] | None  # None if the way to choose gives no order

    @property
    def extra_time(self):
        return statistics.median(self.extra_times)

    @property
    def tau(self):
        return self.taus and statistics.median(self.taus)


def verdicts(size, paces, seconds, reached, noises):
    """Of every case and every way to choose."""
    found = []
    for layout in LAYOUTS:
        plans = [plan_of(layout, batch) for batch in size.batches]
        ways = {
            AFTER: [relative_times(paces[layout], plans, n.reading) for n in noises],
            EARLY: [relative_times(paces[layout], plans, n.early) for n in noises],
            "largest batch": [[-b for b in size.batches]] * size.seeds,
            "smallest batch": [[*size.batches]] * size.seeds,
        }
        for target in size.targets:
            times = [
                [
                    reached[b][target].updates[seed] * seconds[plan]
                    for b, plan in zip(size.batches, plans, strict=True)
                ]
                for seed in range(size.seeds)
            ]
            middle = np.median(times, 0)
            for choice, scores in ways.items():
                picks = [int(np.argmin(each)) for each in scores]
                found.append(
                    Verdict(
                        layout,
                        target,
                        choice,
                        [size.batches[pick] for pick in picks],
                        [t[pick] / min(t) - 1 for t, pick in zip(times, picks, strict=True)],
                        [float(middle[pick] / min(middle) - 1) for pick in picks],
                        [
                            float(kendalltau(*each).statistic)
                            for each in zip(scores, times, strict=True)
                        ]
                        if choice in {AFTER, EARLY}
                        else None,
                    )
                )
    return found


# Tables


def updates_table(size, reached):
    """Of each batch and target: the median updates, and the learning rate they took."""
    rows = []
    for batch in size.batches:
        of_targets = [reached[batch][target] for target in size.targets]
        rows.append([str(batch), *map(_updates, of_targets)])
    return table(["batch", *(f"to loss {t}" for t in size.targets)], rows)


def _updates(one):
    edge = ", the end of the grid" if one.is_at_edge else ""
    return f"{statistics.median(one.updates):.0f} (at {one.rate:.3g}{edge})"


def seconds_table(size, paces, seconds):
    """Of each batch and layout: milliseconds of an update, measured apart from the report, and by the report."""
    rows = []
    for batch in size.batches:
        row = [str(batch)]
        for layout in LAYOUTS:
            plan = plan_of(layout, batch)
            told = paces[layout].update(plan.micro_batch_size, plan.accumulate_grad_batches)
            row += [f"{seconds[plan] * 1e3:.2f}", f"{told * 1e3:.2f}"]
        rows.append(row)
    columns = [f"{layout}: {what}" for layout in LAYOUTS for what in ("ms", "report")]
    return table(["batch", *columns], rows)


def verdict_table(found):
    rows = [
        [
            f"{v.layout}, loss {v.target}, {v.choice}",
            *(_extra(b, e) for b, e in zip(v.batches, v.extra_times, strict=True)),
            f"{v.extra_time:+.1%}",
            f"{statistics.median(v.extra_by_median):+.1%}",
            "" if v.tau is None else f"{v.tau:.2f}",
        ]
        for v in found
    ]
    seeds = [f"seed {seed}" for seed in range(len(found[0].batches))]
    return table(["case and choice", *seeds, "median", "by median times", "τ"], rows)


def _extra(batch, extra):
    return f"{batch}: {extra:+.0%}"


def summary_table(found):
    """All cases of a way to choose in one row."""
    rows = []
    for choice in dict.fromkeys(v.choice for v in found):
        of_it = [v for v in found if v.choice == choice]
        extra = [v.extra_time for v in of_it]
        smooth = [statistics.median(v.extra_by_median) for v in of_it]
        taus = [v.tau for v in of_it if v.tau is not None]
        rows.append(
            [
                choice,
                f"{statistics.median(extra):+.1%}",
                f"{min(extra):+.1%} to {max(extra):+.1%}",
                f"{statistics.median(smooth):+.1%}",
                f"{min(smooth):+.1%} to {max(smooth):+.1%}",
                f"{statistics.median(taus):.2f}" if taus else "",
                f"{min(taus):.2f} to {max(taus):.2f}" if taus else "",
            ]
        )
    return table(
        [
            "batch chosen by",
            "extra time",
            "over cases",
            "by median times",
            "over cases",
            "τ",
            "over cases",
        ],
        rows,
    )


def page(size, paces, seconds, reached, noises, found):
    """All of it as text."""
    rate = reached[NOISE_PLAN.effective_batch_size][size.targets[-1]].rate
    read = ", ".join(f"{n.reading:.0f} ({n.state})" for n in noises)
    early = ", ".join(f"{n.early:.0f}" for n in noises)
    watched = f"{NOISE_PLAN.micro_batch_size} × accumulate {NOISE_PLAN.accumulate_grad_batches}"
    parts = [
        f"Measured on {machine()}; {time.process_time():.0f} s of CPU time in all.",
        f"Updates to a held-out loss, median of {size.seeds} seeds, with the learning rate that takes fewest:",
        updates_table(size, reached),
        "Milliseconds of an update, by CPU time in this benchmark, and as AutoBatch's reports have them:",
        seconds_table(size, paces, seconds),
        (
            f"Noise scale in samples, after {size.noise_updates} updates of {watched} at the learning rate {rate:.3g}, "
            f"of each seed: {read}; of the first 50 updates alone: {early}."
        ),
        (
            "The batch chosen, and how much more time than with the best batch it takes to the loss: by the updates of "
            "that seed, and by those of the median seed, in which less luck is. τ is Kendall's, of the predicted and "
            "the measured times of all batches:"
        ),
        verdict_table(found),
        "The same in short, each case by its median over seeds:",
        summary_table(found),
        goal(found),
    ]
    return "\n\n".join(parts)


def goal(found):
    """Return one sentence about the goal."""
    by_noise = [v for v in found if v.choice == AFTER]
    met = sum(v.extra_time <= GOAL for v in by_noise)
    smooth = sum(statistics.median(v.extra_by_median) <= GOAL for v in by_noise)
    worst = max(by_noise, key=lambda v: v.extra_time)
    return (
        f"Goal, at most {GOAL:.0%} more time by the noise scale in the median over seeds: met in {met} of "
        f"{len(by_noise)} cases (by median times in {smooth}); the worst is {worst.extra_time:.1%} ({worst.layout}, "
        f"loss {worst.target})."
    )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="five batches, two seeds, an easy target"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        help="how many trainings of each batch and learning rate (5)",
    )
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables into this page")
    return parser.parse_args()


def main():
    given = arguments()
    size = QUICK if given.quick else FULL
    if given.seeds:
        size = replace(size, seeds=given.seeds)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    importlib.import_module("autobatch.sinks").console = lambda _: (
        None
    )  # the report is not the point here
    data = Data.of(size.pool)
    seconds = update_seconds(size, data)
    told = paces(size, data)
    reached = {}
    for batch in size.batches:
        reached[batch] = updates_to(size, data, batch)
        print(f"batch {batch}: {time.process_time():.0f} s of CPU time so far", flush=True)
    rate = reached[NOISE_PLAN.effective_batch_size][size.targets[-1]].rate
    noises = [noise(size, data, rate, seed) for seed in range(size.seeds)]
    found = verdicts(size, told, seconds, reached, noises)
    text = page(size, told, seconds, reached, noises, found)
    print(f"\n{text}")
    if given.json:
        given.json.write_text(
            json.dumps(_numbers(size, told, seconds, reached, noises, found), indent=1),
            encoding="utf-8",
        )
    if given.markdown:
        renew(given.markdown, "tradeoff.py", text)


def _numbers(size, paces, seconds, reached, noises, found):
    return {
        "machine": machine(),
        "batches": size.batches,
        "updates": [
            {"batch": batch, "target": target, **asdict(one)}
            for batch, of_targets in reached.items()
            for target, one in of_targets.items()
        ],
        "update_seconds": [
            {
                "layout": layout,
                **asdict(plan),
                "measured": seconds[plan],
                "report": paces[layout].update(plan.micro_batch_size, plan.accumulate_grad_batches),
            }
            for layout in LAYOUTS
            for plan in (plan_of(layout, batch) for batch in size.batches)
        ],
        "noise": [asdict(each) for each in noises],
        "verdicts": [{**asdict(v), "extra_time": v.extra_time, "tau": v.tau} for v in found],
    }


if __name__ == "__main__":
    main()
