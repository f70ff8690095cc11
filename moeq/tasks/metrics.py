"""Metrics as torchmetrics classes: quotients of sums over documents, with the standard error of the quotient.

A document d brings a total t_d and a weight w_d; the metric is a function of R = sum t / sum w.  Linearised around R,
the variance of the quotient (Cochran, Sampling Techniques, 3rd edition, eq. 6.13, for a sample from many documents) is

    var(R) = n / (n - 1) * sum_d u_d^2 / (sum w)^2,    u_d = t_d - R w_d

which for w = 1 is the square of the sample standard error s / sqrt(n) of lm-evaluation-harness, and for totals of 0 and
1 the binomial one.  Perplexity exp(R) has the standard error exp(R) sd(R), bits per unit R / ln 2 have sd(R) / ln 2
(the delta method; the harness draws bootstrap samples there).

What is kept are six float64 sums: n, sum w, sum t, sum u^2, sum u w, sum w^2, with u around the quotient of what was
summed.  Two such parts merge exactly, since u around another quotient R' is u + (R - R') w; nothing is gathered but
the sums, batches and ranks merge in the same way, and there is no difference of large sums as in sum t^2 - R^2 sum w^2.

Shapes: D documents, P parts, S = 6 sums.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from moeq.tasks.documents import Result
from moeq.tasks.task import Aggregate

# What compared models are measured by, besides the metrics of a task: nats per token, and shares.
COMPARISONS: dict[str, Aggregate] = {"kl": "mean", "top1_agreement": "mean", "router_agreement": "mean"}
NUM_SUMS = 6


class Measurement(NamedTuple):
    """A metric with its uncertainty.

    Attributes:
        value: NaN where nothing was measured.
        stderr: Its standard error; None below two documents.
        num_documents: Documents with a weight.
        weight: Sum of the weights: documents, tokens, words or bytes.
    """

    value: float
    stderr: float | None
    num_documents: int
    weight: float


def ratio_sums(totals_D: Tensor, weights_D: Tensor) -> Tensor:
    """sums_S of some documents: n, sum w, sum t, sum u^2, sum u w, sum w^2 in float64; zeros for none."""
    totals_D, weights_D = totals_D.to(torch.float64), weights_D.to(torch.float64)
    total, weight = totals_D.sum(), weights_D.sum()
    around_D = totals_D - _quotient(total, weight) * weights_D
    count = weights_D.count_nonzero().to(torch.float64)
    squares = (around_D.square().sum(), (around_D * weights_D).sum(), weights_D.square().sum())
    return torch.stack((count, weight, total, *squares))


def merge_sums(sums_PS: Tensor) -> Tensor:
    """sums_S of all documents of several parts, each part with its sums around its own quotient."""
    count_P, weight_P, total_P, uu_P, uw_P, ww_P = sums_PS.unbind(-1)
    weight, total = weight_P.sum(), total_P.sum()
    shift_P = _quotient(total_P, weight_P) - _quotient(total, weight)
    uu_P = uu_P + shift_P * (2 * uw_P + shift_P * ww_P)
    uw_P = uw_P + shift_P * ww_P
    return torch.stack((count_P.sum(), weight, total, uu_P.sum().clamp(min=0), uw_P.sum(), ww_P.sum()))


def measurement(sums_S: Tensor, kind: Aggregate) -> Measurement:
    """The metric of some documents from their sums."""
    count, weight, total, uu, _, _ = sums_S.tolist()
    if weight == 0:
        return Measurement(math.nan, None, 0, 0.0)
    mean = total / weight
    stderr = math.sqrt(count / (count - 1) * uu) / weight if count > 1 else None
    if kind == "perplexity":
        value = _exp(mean)
        return Measurement(value, stderr and value * stderr, int(count), weight)
    scale = math.log(2) if kind == "bits" else 1.0
    return Measurement(mean / scale, stderr and stderr / scale, int(count), weight)


def mean_over_groups(groups: Sequence[Measurement]) -> Measurement:
    """Mean of independent groups, each counting the same whatever its size (the macro average).

    Its variance is the sum of the groups' over k^2; unknown where one group's is.
    """
    errors = [group.stderr for group in groups]
    known = [error for error in errors if error is not None]
    stderr = math.hypot(*known) / len(groups) if len(known) == len(groups) else None
    value = math.fsum(group.value for group in groups) / len(groups)
    return Measurement(value, stderr, sum(group.num_documents for group in groups), float(len(groups)))


class RatioMetric(Metric):
    """Quotient of a summed total and a summed weight, with its standard error.

    Args:
        kind: "mean" of the totals, "perplexity" (exp of it) or "bits" (it in bits instead of nats).

    Raises:
        ValueError: The kind is none of these.
    """

    is_differentiable = False
    full_state_update = False
    sums_S: Tensor

    def __init__(self, kind: Aggregate = "mean") -> None:
        super().__init__()
        if kind not in get_args(Aggregate):
            raise ValueError(f"the kind of a metric ({kind!r}) must be one of {', '.join(get_args(Aggregate))}")
        self.kind: Aggregate = kind
        self.add_state("sums_S", torch.zeros(NUM_SUMS, dtype=torch.float64), dist_reduce_fx=merge_sums)

    def update(self, total: Tensor | float, weight: Tensor | float) -> None:
        """Add documents, one number or one-dimensional tensor of numbers each."""
        device = self.sums_S.device
        totals_D, weights_D = (torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in (total, weight))
        self.sums_S = merge_sums(torch.stack((self.sums_S, ratio_sums(totals_D, weights_D).to(device))))

    def compute(self) -> Measurement:
        """The measurement over all batches and ranks."""
        return measurement(self.sums_S, self.kind)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # A cast of the parent module (to bfloat16, say) moves the sums where it goes, and leaves their dtype.
        moved: nn.Module = super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)
        return moved


class TaskMetrics(nn.Module):
    """The metrics of a task and of its groups.

    Args:
        task: Name of the task.
        metrics: Kind of each metric; where two models are compared, ``COMPARISONS`` too.
        groups: The different ``Document.groups`` of all documents, those of other ranks too; the last name of each is
            its finest group.
        level: What the finest groups are called in the name of the mean over them.
    """

    def __init__(
        self,
        task: str,
        metrics: Mapping[str, Aggregate],
        groups: Iterable[tuple[str, ...]] = (),
        level: str = "subject",
    ) -> None:
        super().__init__()
        self.task, self.level = task, level
        self.kinds = dict(metrics)
        # Sorted, so that all ranks have them in the same order, in whatever order they saw them.
        self.groups = tuple(sorted(set(groups) - {()}))
        names = ["", *dict.fromkeys(name for path in self.groups for name in path)]
        # Not a ModuleDict, whose keys may not have dots.
        self._index = {key: i for i, key in enumerate((group, name) for group in names for name in self.kinds)}
        # Held back until compute: tiny tensor operations for each of a hundred groups would slow an evaluation down.
        self._pending: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        self._metrics = nn.ModuleList(RatioMetric(self.kinds[name]) for _, name in self._index)

    def add(self, *results: Result) -> None:
        """Count documents for the task and for each of their groups.

        Raises:
            ValueError: A result has a group or a metric that the constructor was not told.
        """
        for result in results:
            for group in dict.fromkeys(("", *result.groups)):
                for name, value in result.values.items():
                    if (group, name) not in self._index:
                        where = f"group {group!r} of task {self.task}" if group else f"task {self.task}"
                        known = ", ".join(self.kinds)
                        raise ValueError(f"{where} has no metric {name!r}; it was made with the metrics {known}")
                    self._pending[group, name].append(value)

    def compute(self) -> dict[str, dict[str, Measurement]]:
        """Measurements by group ("" is the task) and metric, of all ranks; all must call it, and all get the same.

        Metrics without data on any rank are left out.  Tasks with groups have ``<metric>_by_<level>`` besides: the
        mean over their finest groups, for each metric that is a mean and no comparison of models.
        """
        computed: dict[str, dict[str, Measurement]] = {}
        for group, name in self._index:
            metric = self._of(group, name)
            # Also where there are none: that marks the metric as updated, and all ranks take part in the reduction.
            # Sorted: documents come in other orders in a run that goes on, and a sum rounds by its order.
            pairs = torch.tensor(sorted(self._pending.pop((group, name), [])), dtype=torch.float64).reshape(-1, 2)
            metric.update(*pairs.unbind(-1))
            found: Any = metric.compute()
            if found.num_documents:
                computed.setdefault(group, {})[name] = found
        finest = dict.fromkeys(path[-1] for path in self.groups)
        for name in [name for name, kind in self.kinds.items() if kind == "mean" and name not in COMPARISONS]:
            by_group = [computed[group][name] for group in finest if name in computed.get(group, {})]
            if by_group:
                computed[""][f"{name}_by_{self.level}"] = mean_over_groups(by_group)
        return computed

    def reset(self) -> None:
        """Forget all documents."""
        self._pending.clear()
        for group, name in self._index:
            self._of(group, name).reset()

    def _of(self, group: str, name: str) -> RatioMetric:
        metric = self._metrics[self._index[group, name]]
        assert isinstance(metric, RatioMetric)
        return metric


def _quotient(total: Tensor, weight: Tensor) -> Tensor:
    """Their quotient, and 0 where there is no weight."""
    return torch.where(weight == 0, 0.0, total / torch.where(weight == 0, 1.0, weight))


def _exp(value: float) -> float:
    """exp, infinite where it overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
