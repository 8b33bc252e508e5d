"""The search: schedules that are fast and close to the exact samples, as a front of both.

NSGA-II's survival (pymoo) over genomes, with moves made for schedules, small generations, and from coarse to fine.
Children are many and evaluations few: a model of what was evaluated so far chooses which children are evaluated.

Replays from its store: what chose the candidates sees only the seed and earlier results, so that a search that was
killed makes the same choices again, takes stored results instead of computing them, and ends at the same front.

Source    Deb et al. 2002 (NSGA-II); ECAD, ICLR 2026, which searches caching schedules by it; Jones et al. 1998
          (expected improvement over the prediction of a Gaussian process).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.crossover import Crossover
from pymoo.core.infill import InfillCriterion
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.indicators.hv import HV

from dcc.errors import UsageError
from dcc.ir.schedule import Schedule, full_schedule
from dcc.search.genome import (
    COMPUTES,
    Array,
    Genome,
    Space,
    canonical,
    coarsen,
    features,
    from_schedule,
    to_schedule,
    trend,
    work,
)
from dcc.search.moves import cross, mutate
from dcc.search.store import Evaluation, Store
from dcc.search.surrogate import LatencyModel, LossModel
from dcc.search.workers import Workers

SPEEDS = (1.5, 2.0, 3.0, 4.0)
LOSS_DEPTH = 1e-5  # a loss this much below the worst seed's is as good as none
MINIMUM_TO_FIT = 6
MODEL_POINTS = 300
BINS = 8  # of speed, that are served in turn
KEPT_IN_BIN = 5
CURIOSITY = 0.5  # of a standard deviation: how wrong predictions are taken to be
TINY = 1e-300
EXACT = "exact"


@dataclass(frozen=True)
class Limits:
    """What every schedule of the front must keep. `latency_of` and `history_bytes_of` predict it before evaluation."""

    latency_ms: float | None = None
    psnr: float | None = None
    history_bytes: int | None = None
    latency_of: Callable[[Schedule], float] | None = None
    history_bytes_of: Callable[[Schedule], int] | None = None

    def __post_init__(self) -> None:
        for limit, predicts in (("latency_ms", self.latency_of), ("history_bytes", self.history_bytes_of)):
            if getattr(self, limit) is not None and predicts is None:
                raise UsageError(f"a limit of {limit} needs what predicts it", want=f"{limit.split('_ms')[0]}_of")
        for name, value, least in (("latency", self.latency_ms, 1e-9), ("history", self.history_bytes, 0)):
            if value is not None and not least <= value < math.inf:
                raise UsageError(f"the limit of {name} is out of range", got=value, want="a finite number above 0")
        if self.psnr is not None and not math.isfinite(self.psnr):
            raise UsageError("the limit of psnr is out of range", got=self.psnr, want="a finite number")

    def broken_before(self, schedule: Schedule) -> bool:
        """Whether the schedule is known to break a limit before it is evaluated."""
        return (
            self.latency_ms is not None
            and self.latency_of is not None
            and self.latency_of(schedule) > self.latency_ms
        ) or self.breaks_history(schedule)

    def breaks_history(self, schedule: Schedule) -> bool:
        return (
            self.history_bytes is not None
            and self.history_bytes_of is not None
            and self.history_bytes_of(schedule) > self.history_bytes
        )

    def violation(self, schedule: Schedule, evaluation: Evaluation) -> float:
        """How far the limits are missed, 0 when they are kept."""
        missed = 0.0
        if self.latency_ms is not None:
            missed += max(0.0, evaluation.latency_ms / self.latency_ms - 1)
        if self.psnr is not None:
            missed += min(max(0.0, self.psnr - evaluation.psnr), 1e6)
        return missed + float(self.breaks_history(schedule))


@dataclass(frozen=True)
class Options:
    """How to search. Equal options and equal results give an equal search.

    `screened` children are made for each one that is evaluated, in `rounds` rounds of moves; with 1 the moves decide
    alone. `speeds` is the range of speed-ups over the exact schedule that the search is for. `stages` are the shares
    of the budget after which moves get finer, one less than there are levels; by default whole calls take 40 %, and
    each finer level begins in turn until 85 %.
    """

    budget: int = 200
    generation: int = 8
    population: int = 40
    seed: int = 0
    screened: int = 40
    rounds: int = 2
    speeds: tuple[float, float] = (1.2, 5.0)
    stages: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        smallest = min(self.budget, self.generation, self.population, self.screened, self.rounds)
        if smallest < 1 or not 0 < self.speeds[0] < self.speeds[1]:
            raise UsageError("the search's options are out of range", got=self, want="counts of 1 or more")


@dataclass(frozen=True)
class Candidate:
    """An evaluated schedule. `asked` is what the search gave, `schedule` what was run and is to be used."""

    asked: Schedule
    digest: str  # of `asked`: the key in the store
    evaluation: Evaluation
    generation: int
    origin: str  # the seed's name, or "search"

    @property
    def schedule(self) -> Schedule:
        return self.evaluation.schedule or self.asked


@dataclass(frozen=True)
class Row:
    """The state after a generation. `best` is the highest psnr at each speed-up of SPEEDS, where there is one."""

    generation: int
    evaluations: int
    hypervolume: float
    best: Mapping[str, float]


@dataclass(frozen=True)
class Progress:
    """What a progress callback sees after each evaluation; `seconds_left` is None until one was timed."""

    evaluations: int
    budget: int
    generation: int
    hypervolume: float
    best: Mapping[str, float]
    seconds_left: float | None
    latest: Candidate


@dataclass(frozen=True)
class Result:
    """Every evaluated candidate in the order asked, the non-dominated ones by latency, and the history.

    `computed` counts the evaluations that this run computed; the others came from the store.
    """

    candidates: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    history: tuple[Row, ...]
    reference: tuple[float, float]  # latency of the exact schedule in ms, loss of the worst seed
    computed: int


def search(
    space: Space,
    seeds: Iterable[Schedule],
    workers: Workers,
    store: Store,
    options: Options | None = None,
    limits: Limits | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """The front that `options.budget` different evaluations find, the exact schedule and the seeds among them.

    Every evaluation is in the store before another is asked for. Candidates in the store are not evaluated again.
    """
    run = _Search(space, workers, store, options or Options(), limits or Limits(), progress)
    return run.run(list(seeds))


def non_dominated(candidates: Sequence[Candidate], limits: Limits | None = None) -> tuple[Candidate, ...]:
    """Candidates that keep the limits and that no other beats in latency and loss, by latency."""
    kept = [item for item in candidates if limits is None or limits.violation(item.asked, item.evaluation) == 0]
    front: list[Candidate] = []
    for item in sorted(kept, key=lambda item: (item.evaluation.latency_ms, item.evaluation.loss, item.digest)):
        if item.evaluation.loss < (front[-1].evaluation.loss if front else math.inf):
            front.append(item)
    return tuple(front)


@dataclass
class _Search:
    """The state of one search."""

    space: Space
    workers: Workers
    store: Store
    options: Options
    limits: Limits
    progress: Callable[[Progress], None] | None
    candidates: list[Candidate] = field(default_factory=list)
    genomes: list[Genome] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    history: list[Row] = field(default_factory=list)
    reference: tuple[float, float] = (1.0, 1.0)
    computed: int = 0
    seconds: float = 0.0

    def run(self, seeds: list[Schedule]) -> Result:
        problem = Problem(n_var=self.space.size, n_obj=2, n_ieq_constr=1, vtype=int)
        first = self._first(seeds)
        self._evaluate(first, 0)
        losses = [item.evaluation.loss for item in self.candidates if math.isfinite(item.evaluation.loss)]
        self.reference = (self.candidates[0].evaluation.latency_ms, max([*losses, 0.0]) or 1.0)
        self._note(0)
        children = Children(self)
        algorithm = NSGA2(
            pop_size=self.options.population,
            n_offsprings=self.options.generation,
            sampling=self._population(range(len(self.candidates))),
            mating=children,
            eliminate_duplicates=False,
            seed=self.options.seed,
        )
        algorithm.setup(problem)
        algorithm.tell(infills=self._told(algorithm.ask(), 0))
        generation = 0
        while len(self.candidates) < self.options.budget:
            generation += 1
            asked = algorithm.ask()
            if asked is None or not len(asked):
                break  # nothing new is within reach
            asked = asked[: self.options.budget - len(self.candidates)]
            start = len(self.candidates)
            self._evaluate([(children.schedules[row.X.tobytes()], row.X) for row in asked], generation)
            algorithm.tell(infills=self._told(asked, start))
            self._note(generation)
        return Result(
            tuple(self.candidates),
            non_dominated(self.candidates, self.limits),
            tuple(self.history),
            self.reference,
            self.computed,
        )

    def _first(self, seeds: list[Schedule]) -> list[tuple[Schedule, Array]]:
        """The exact schedule, then every seed as it is, each once, as far as the budget goes."""
        exact = full_schedule(self.space.components, self.space.calls)
        found: dict[str, tuple[Schedule, Array]] = {}
        for seed in [exact, *seeds]:
            fitting = replace(seed, program="", sampler="")
            genome = from_schedule(self.space, fitting)
            if fitting.guidance != exact.guidance and not self.space.guided:
                raise UsageError("a seed has guidance and the model has none", at=seed.name)
            if seed is exact:
                fitting = to_schedule(self.space, genome, EXACT)
            found.setdefault(fitting.digest(), (fitting, genome.vector()))
        return list(found.values())[: self.options.budget]

    def _evaluate(self, asked: Sequence[tuple[Schedule, Array]], generation: int) -> None:
        """All of them are evaluated, stored, and appended in this order."""
        found: dict[int, Evaluation] = {}
        missing: list[int] = []
        for index, (schedule, _) in enumerate(asked):
            stored = self.store.get(schedule.digest())
            if stored is None:
                missing.append(index)
            else:
                found[index] = stored
        for index, evaluation in self.workers.run([asked[index][0] for index in missing]):
            schedule = asked[missing[index]][0]
            found[missing[index]] = self.store.put(schedule, evaluation)
            self.computed += 1
            self.seconds += evaluation.seconds
            self._report(schedule, found[missing[index]], generation, len(self.candidates) + len(found))
        for index, (schedule, vector) in enumerate(asked):
            digest = schedule.digest()
            self.known.add(digest)
            origin = schedule.name if generation == 0 else "search"
            self.candidates.append(Candidate(schedule, digest, found[index], generation, origin))
            self.genomes.append(Genome.of_vector(self.space, vector))

    def _report(self, schedule: Schedule, evaluation: Evaluation, generation: int, evaluations: int) -> None:
        if self.progress is None:
            return
        last = self.history[-1] if self.history else Row(0, 0, 0.0, {})
        left = None
        if self.computed:
            each = self.seconds / self.computed / self.workers.slots
            left = each * max(self.options.budget - evaluations, 0)
        latest = Candidate(schedule, schedule.digest(), evaluation, generation, schedule.name or "search")
        self.progress(
            Progress(evaluations, self.options.budget, generation, last.hypervolume, last.best, left, latest)
        )

    def _note(self, generation: int) -> None:
        values = self.objectives(range(len(self.candidates)))
        kept = values[[self._violation(index) == 0 for index in range(len(self.candidates))]]
        inside = kept[(kept < 0).all(axis=1)]
        volume = float(HV(ref_point=np.zeros(2))(inside)) if len(inside) else 0.0
        exact = self.reference[0]
        best = {}
        for speed in SPEEDS:
            found = [
                item.evaluation.psnr
                for index, item in enumerate(self.candidates)
                if item.evaluation.latency_ms <= exact / speed and self._violation(index) == 0
            ]
            if found:
                best[f"{speed:g}x"] = max(found)
        self.history.append(Row(generation, len(self.candidates), volume, best))

    def _violation(self, index: int) -> float:
        candidate = self.candidates[index]
        return self.limits.violation(candidate.asked, candidate.evaluation)

    def objectives(self, indices: Iterable[int]) -> Array:
        """Logs of latency and loss over the reference point's, each better when lower, float64 [count, 2]."""
        rows = [self.candidates[index].evaluation for index in indices]
        return np.array([[self._log_latency(row.latency_ms), self._log_loss(row.loss)] for row in rows]).reshape(-1, 2)

    def _log_latency(self, latency: float) -> float:
        return float(np.log(np.clip(latency / self.reference[0], 1e-6, 1e6)))

    def _log_loss(self, loss: float) -> float:
        return float(np.log(np.clip(loss / self.reference[1], LOSS_DEPTH, 1e6)))

    def _population(self, indices: Iterable[int]) -> Population:
        rows = list(indices)
        return Population.new("X", np.stack([self.genomes[row].vector() for row in rows]))

    def _told(self, asked: Population, start: int) -> Population:
        rows = range(start, start + len(asked))
        asked.set("F", self.objectives(rows))
        asked.set("G", np.array([[self._violation(row)] for row in rows]))
        for row, individual in zip(rows, asked, strict=True):
            individual.set("index", row)
            individual.evaluated.update(("F", "G"))
        return asked

    def bins(self) -> Array:
        """Edges of the bins of speed, as log latencies, ascending, [BINS + 1]."""
        slow, fast = self.options.speeds
        if self.limits.latency_ms is not None:
            slow = max(slow, self.reference[0] / self.limits.latency_ms)
        return -np.log(np.geomspace(max(fast, 1.01 * slow), slow, BINS + 1))

    def highest_loss(self) -> float:
        """Log of the loss that the limit of the psnr allows, infinite without one."""
        rows = [item.evaluation for item in self.candidates]
        # The psnr of an error depends on the samples' range, which only the evaluator knows.
        ranges = [row.psnr / 10 + math.log10(row.loss) for row in rows if math.isfinite(row.psnr) and row.loss > 0]
        if self.limits.psnr is None or not ranges:
            return math.inf
        return self._log_loss(10 ** (float(np.median(ranges)) - self.limits.psnr / 10))

    def levels(self) -> Array:
        """How likely a move acts on each level now: the current level half, coarser ones the other half."""
        count = len(self.space.starts)
        shares = self.options.stages or tuple(0.4 + 0.45 * index / max(count - 2, 1) for index in range(count - 1))
        # The budget that the search began with: a larger one on resume must not change what was chosen before.
        spent = len(self.candidates) / max(self.store.first_budget or self.options.budget, 1)
        current = min(sum(spent >= share for share in shares), count - 1)
        chances = np.zeros(count)
        chances[: current + 1] = 0.5 / (current + 1)
        chances[current] += 0.5
        return chances


class Moves(Mutation):
    """pymoo's mutation: one move, and with probability 0.4 each another one."""

    def __init__(self, run: _Search) -> None:
        super().__init__()
        self.run = run

    def _do(self, problem: Problem, X: Array, *args: Any, random_state: np.random.Generator, **kwargs: Any) -> Array:
        space, chances = self.run.space, self.run.levels()
        groups = [space.groups(level) for level in range(len(space.starts))]
        alike = space.alike()
        rows = []
        for row in X:
            genome = Genome.of_vector(space, row)
            while True:
                level = groups[random_state.choice(len(groups), p=chances)]
                if alike and random_state.random() < 0.15:
                    level = alike
                genome = mutate(space, genome, level[random_state.integers(len(level))], random_state)
                if random_state.random() >= 0.4:
                    break
            rows.append(genome.vector())
        return np.stack(rows)


class CallRanges(Crossover):
    """pymoo's crossover: two parents exchange a range of calls."""

    def __init__(self, run: _Search, prob: float = 0.3) -> None:
        super().__init__(2, 2, prob=prob)
        self.run = run

    def _do(self, problem: Problem, X: Array, *args: Any, random_state: np.random.Generator, **kwargs: Any) -> Array:
        space = self.run.space
        children = np.empty_like(X)
        for index, (left, right) in enumerate(zip(X[0], X[1], strict=True)):
            pair = cross(space, Genome.of_vector(space, left), Genome.of_vector(space, right), random_state)
            children[0, index], children[1, index] = (child.vector() for child in pair)
        return children


def repair(space: Space, genome: Genome, limits: Limits) -> Genome:
    """A canonical genome whose schedule keeps the limits of latency and histories, as near as simple steps get.

    Too many bytes: lower orders, then deltas for branches, then ever fewer groups, then no histories at all where
    that is what it takes. Too slow: the computed call that lies nearest to others computes no more, for all
    components at once.
    """
    genome = canonical(space, genome)
    if limits.latency_ms is None and limits.history_bytes is None:
        return genome
    if limits.breaks_history(to_schedule(space, genome)):
        genome = _smaller(space, genome, limits)
    while limits.broken_before(to_schedule(space, genome)):
        computed = np.flatnonzero((genome.actions == COMPUTES).any(axis=1))
        if len(computed) < 2:
            break
        ends = np.append(computed[2:], space.calls)
        gaps = ends - computed[:-1]
        actions = genome.actions.copy()
        call = computed[1 + int(gaps.argmin())]
        before = actions[call - 1]
        actions[call] = np.where(before == COMPUTES, 1 + min(space.orders), before)
        genome = canonical(space, Genome(actions, genome.guidance, genome.branch))
    return genome


def _smaller(space: Space, genome: Genome, limits: Limits) -> Genome:
    def fits(candidate: Genome) -> bool:
        return not limits.breaks_history(to_schedule(space, candidate))

    for order in (1, 0):
        genome = canonical(space, replace(genome, actions=np.minimum(genome.actions, 1 + order)))
        if fits(genome):
            return genome
    genome = canonical(space, replace(genome, branch=np.zeros_like(genome.branch)))
    for level in range(len(space.starts) - 1, -1, -1):
        if fits(genome):
            return genome
        genome = coarsen(space, genome, level)
    if fits(genome):
        return genome
    return canonical(space, Genome(np.zeros_like(genome.actions), np.zeros_like(genome.guidance), genome.branch))


class Children(InfillCriterion):
    """pymoo's mating: what to evaluate next.

    Children of the population are made in rounds, each from those that the model thought best of the round before.
    Of those that were never evaluated one is taken for each bin of speed in turn: the one that promises to improve
    the front most there, as if those taken before had come true. All bins are served alike, because a hypervolume
    alone would spend most of the budget where the loss is smallest.
    """

    def __init__(self, run: _Search) -> None:
        super().__init__()
        self.run = run
        self.moves, self.ranges = Moves(run), CallRanges(run)
        self.schedules: dict[bytes, Schedule] = {}

    def do(
        self, problem: Problem, pop: Population, n_offsprings: int, random_state: Any = None, **kwargs: Any
    ) -> Population:
        options, run = self.run.options, self.run
        self.schedules = {}
        parents = self._parents(pop)
        picked: list[Array] = []
        chosen: set[str] = set()
        model = _Model.of(run) if options.screened > 1 else None
        if model is not None:
            evaluated = {genome.vector().tobytes() for genome in run.genomes}
            pool: dict[bytes, Array] = {}
            for _ in range(options.rounds):
                count = n_offsprings * options.screened // options.rounds
                fresh = self._children(problem, parents, count, random_state)
                pool.update({row.tobytes(): row for row in fresh if row.tobytes() not in evaluated})
                parents = model.best_of_bins(np.concatenate([parents, fresh]), KEPT_IN_BIN)
            rows = np.stack(list(pool.values())) if pool else np.empty((0, run.space.size), dtype=np.int64)
            for index in model.most_promising(rows, 2 * n_offsprings, len(run.history) * n_offsprings):
                if len(picked) < n_offsprings:
                    self._take(rows[index], picked, chosen)
        # Without a model, or where it has nothing left to choose from.
        for _ in range(self.n_max_iterations):
            if len(picked) >= n_offsprings:
                break
            for row in self._children(problem, parents, n_offsprings - len(picked), random_state):
                if len(picked) < n_offsprings:
                    self._take(row, picked, chosen)
        return Population.new("X", np.stack(picked)) if picked else Population.create()

    def _take(self, row: Array, picked: list[Array], chosen: set[str]) -> None:
        """The row, repaired, is picked if it is new. Only here: to predict a schedule's limits exactly takes time."""
        genome = repair(self.run.space, Genome.of_vector(self.run.space, row), self.run.limits)
        row, schedule = genome.vector(), to_schedule(self.run.space, genome)
        digest = schedule.digest()
        if digest in self.run.known or digest in chosen or self.run.limits.broken_before(schedule):
            return
        chosen.add(digest)
        picked.append(row)
        self.schedules[row.tobytes()] = schedule

    def _parents(self, pop: Population) -> Array:
        """Vectors of survivors whose speed is asked for, the front first; all, where there are none."""
        low, high = (-math.log(speed) for speed in self.run.options.speeds)
        latency = pop.get("F")[:, 0]
        inside = np.flatnonzero((latency <= low) & (latency >= high))
        rows = inside if len(inside) else np.arange(len(pop))
        return np.stack([pop[row].X for row in rows])

    def _children(self, problem: Problem, parents: Array, count: int, random: np.random.Generator) -> Array:
        """Canonical children, `count` or one more, of parents drawn evenly and partners drawn from all."""
        pairs = math.ceil(count / 2)
        draws = np.concatenate([random.permutation(len(parents)) for _ in range(math.ceil(pairs / len(parents)))])
        partners = random.integers(len(parents), size=pairs)
        population = Population.new("X", parents)
        matings = np.column_stack([draws[:pairs], partners])
        children = self.ranges.do(problem, population, parents=matings, random_state=random)
        children = self.moves.do(problem, children, random_state=random)
        genomes = Genome.of_vector(self.run.space, np.stack([child.X for child in children]))
        return canonical(self.run.space, genomes).vector()


class _Model:
    """Predictions for genomes from everything that was evaluated."""

    @staticmethod
    def of(run: _Search) -> _Model | None:
        """None where there is too little to learn from."""
        finite = [
            index
            for index, item in enumerate(run.candidates)
            if math.isfinite(item.evaluation.loss) and math.isfinite(item.evaluation.latency_ms)
        ]
        # Next to no loss says nothing of the others, and its log would dominate.
        used = [index for index in finite if run.candidates[index].evaluation.loss > run.reference[1] * LOSS_DEPTH]
        return _Model(run, finite, used[-MODEL_POINTS:]) if len(used) >= MINIMUM_TO_FIT else None

    def __init__(self, run: _Search, finite: list[int], used: list[int]) -> None:
        self.run = run
        values = run.objectives(range(len(run.candidates)))
        genomes = Genome.of_vector(run.space, np.stack([run.genomes[index].vector() for index in used]))
        self.loss = LossModel.fit(features(run.space, genomes), trend(run.space, genomes), values[used, 1])
        latencies = np.array([run.candidates[index].evaluation.latency_ms for index in used])
        self.latency = LatencyModel.fit(work(run.space, genomes), latencies)
        feasible = [index for index in finite if run._violation(index) == 0]
        self.front = values[feasible]

    def predict(self, rows: Array) -> tuple[Array, Array, Array]:
        """Log latency, log loss and its standard deviation of canonical genomes, relative to the reference point."""
        genomes = Genome.of_vector(self.run.space, rows)
        loss, spread = self.loss.predict(features(self.run.space, genomes), trend(self.run.space, genomes))
        latency = self.latency.predict(work(self.run.space, genomes))
        return np.log(np.clip(latency / self.run.reference[0], 1e-6, 1e6)), loss, spread

    def judge(self, rows: Array) -> Judgement:
        """How much each of the canonical genomes may improve the front, and in which bin of speed."""
        latency, loss, spread = self.predict(rows)
        edges = self.run.bins()
        places = np.searchsorted(edges[1:-1], latency)
        return Judgement(latency, loss, spread, places, edges[0], edges[-1], self.run.highest_loss())

    def best_of_bins(self, rows: Array, each: int) -> Array:
        """The `each` most promising rows of every bin of speed."""
        judged = self.judge(rows)
        hopes = judged.hopes(self.front)
        kept: list[Any] = []
        for place in range(len(self.run.bins()) - 1):
            inside = np.flatnonzero((judged.bin == place) & (hopes > -np.inf))
            kept.extend(inside[np.argsort(-hopes[inside], kind="stable")[:each]])
        return rows[kept] if kept else rows

    def most_promising(self, rows: Array, count: int, turn: int) -> list[int]:
        """`count` rows, one bin of speed after another, each row as if those before it had come true."""
        judged = self.judge(rows)
        bins = len(self.run.bins()) - 1
        front, order = self.front, list[int]()
        left = np.ones(len(rows), dtype=bool)
        while len(order) < min(count, len(rows)) and left.any():
            hopes = np.where(left, judged.hopes(front), -np.inf)
            inside = np.where(judged.bin == (turn + len(order)) % bins, hopes, -np.inf)
            best = int(np.argmax(inside if (inside > -np.inf).any() else hopes))
            order.append(best)
            left[best] = False
            front = np.vstack([front, [judged.latency[best], judged.loss[best]]])
        return order


@dataclass(frozen=True)
class Judgement:
    """Predictions of genomes: log latency, log loss with its standard deviation, bin of speed; the range of bins."""

    latency: Array
    loss: Array
    spread: Array
    bin: Array
    fastest: float
    slowest: float
    highest: float  # log loss that is allowed

    def hopes(self, front: Array) -> Array:
        """Log of the expected improvement of the log loss over `front` at the same latency; -inf outside the range.

        Weighed with the probability that the loss is allowed.
        """
        order = front[np.argsort(front[:, 0], kind="stable")]
        levels = np.minimum.accumulate(np.concatenate([[0.0], order[:, 1]]))
        level = levels[np.searchsorted(order[:, 0], self.latency, side="right")]
        spread = np.maximum(CURIOSITY * self.spread, 1e-6)
        ratio = np.clip((level - self.loss) / spread, -30, 30)
        density = np.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
        expected = np.log(np.maximum(spread * (ratio * _normal(ratio) + density), TINY))
        if math.isfinite(self.highest):
            expected += np.log(np.maximum(_normal(np.clip((self.highest - self.loss) / spread, -30, 30)), TINY))
        outside = (self.latency > self.slowest) | (self.latency < self.fastest)
        return np.where(outside, -np.inf, np.round(expected, 9))


def _normal(values: Array) -> Array:
    """Distribution function of the standard normal distribution."""
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in values])
