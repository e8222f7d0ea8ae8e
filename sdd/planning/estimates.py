"""What a stage will take, from the sizes of a model and the counts of its work: seconds, bytes of memory and of disk.

Meant for deciding what to start on which machine: rough, within about a factor of 3 of what is then measured. What a
pass takes is in `cost_model`. Memory is that of the device that computes, at its peak. Knows nothing of Hydra or the
store; loads no library.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sdd.evaluation.likelihoods import MOST_TOKENS
from sdd.evaluation.prefixes import LONG
from sdd.forward.bypass import LOGITS
from sdd.forward.chunks import CHUNK_TOKENS, KEPT_STATES, is_cut
from sdd.forward.decoding import REFILL
from sdd.importance.removal import MAX_TOKENS as MOST_KEPT
from sdd.planning.cost_model import BYTES, DEVICES, CostModel, Shape

CHARACTERS_PER_TOKEN = 4.0
"""Of English under a large vocabulary; small tokenizers have fewer."""
PROCESS = 3e8
"""Bytes of a process and its libraries, where the work is on the CPU and holds little else."""


@dataclass(frozen=True)
class Estimate:
    """Seconds, peak bytes on the computing device, bytes left on disk; `on_cpu` where no GPU is computed with.

    `elsewhere`: a server computes, for as long as nobody knows here; the seconds leave that out.
    """

    seconds: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    on_cpu: bool = False
    elsewhere: bool = False


def elsewhere(needed: Estimate) -> Estimate:
    """The same work where a server does it: here a process waits for it and writes down what it says."""
    return Estimate(0.0, PROCESS, needed.disk, on_cpu=True, elsewhere=True)


def scores(
    cost_model: CostModel, texts: int, length: float, batch: int, blocks: float | None = None, heads: float = 0.0
) -> Estimate:
    """Calibration texts of `length` tokens, each through `blocks` blocks in all (by default one pass without the head)
    and `heads` times through the head; a batch has at most 16,384 tokens, or 4,096 where their states are kept."""
    tokens = texts * length
    together = min(batch * length, MOST_KEPT if heads else 16_384)
    once = cost_model.passes(tokens, length, -(-tokens // together), head=False)
    logits = heads * tokens * cost_model.shape.head_flops / cost_model.device.flops[cost_model.width]
    seconds = cost_model.opening + once * (blocks or cost_model.blocks) / cost_model.blocks + logits
    held = cost_model.activations(together, length)
    if heads:  # the states before every block, and logits some at a time
        held += together * cost_model.width * cost_model.shape.hidden * cost_model.blocks + cost_model.logits(
            LOGITS / cost_model.shape.vocabulary
        )
    return Estimate(seconds, cost_model.weights + held, 1e5)


def given(cost_model: CostModel, rows: int, length: float, batch: int) -> Estimate:
    """Rows of `length` tokens are shown, of whose answers every token's logits are looked at, some at a time."""
    held = cost_model.weights + cost_model.activations(batch * length, length) + cost_model.logits(512)
    return Estimate(
        cost_model.opening + cost_model.passes(rows * length, length, -(-rows // batch)), held, 100.0 * rows
    )


def drafted(cost_model: CostModel, rows: int, length: float, batch: int) -> Estimate:
    """Answers are shown to the student alone and beside the unpruned model, which counts as large as that."""
    needed = given(cost_model, 3 * rows, length, batch)
    return replace(needed, memory=2 * needed.memory)


def taught(cost_model: CostModel, rows: int, length: float, batch: int, disk: float = 0.0) -> Estimate:
    """Rows are shown, and `disk` bytes kept of what is said to them."""
    seconds = cost_model.opening + cost_model.passes(rows * length, length, -(-rows // batch))
    memory = cost_model.weights + cost_model.activations(batch * length, length) + 2 * cost_model.logits(512)
    return Estimate(seconds + disk / cost_model.device.disk, memory, disk)


def weights_read(cost_model: CostModel) -> Estimate:
    """Every tensor of the checkpoint is read, one at a time."""
    return Estimate(1 + cost_model.weights / cost_model.device.disk, PROCESS, 1e5, on_cpu=True)


def gradient_scores(
    cost_model: CostModel, texts: int, length: float, micro_batch_tokens: int, stages: int = 1
) -> Estimate:
    """A pass forward and back, gradients of the MLPs' matrices included, and in the second stage the teacher's beside.

    What backward keeps of every block is held; logits are not.
    """
    tokens, together = texts * length, max(length, min(micro_batch_tokens, texts * length))
    seconds = cost_model.opening + cost_model.passes(tokens, length, tokens / together, cost=2.0 + stages)
    kept = cost_model.blocks * cost_model.kept_by_backward(length, trained=False)
    formed = 16 * cost_model.shape.hidden * cost_model.shape.intermediate
    return Estimate(seconds, cost_model.weights + together * kept + formed, 1e5)


def pruned(cost_model: CostModel) -> Estimate:
    """The checkpoint is read and what is kept of it written, some megabytes at a time, whatever the device."""
    seconds = 1 + 2 * cost_model.weights / cost_model.device.disk
    return Estimate(seconds, PROCESS, cost_model.weights, on_cpu=True)


def repaired(whole: CostModel, copied: CostModel, texts: int, length: float, batch: int) -> Estimate:
    """One pass of the unpruned model, the squares of one block's MLP activations in float64, and a copy of the rest."""
    inner, tokens = whole.shape.intermediate, texts * length
    passed, written = scores(whole, texts, length, batch), pruned(copied)
    sums = 2 * tokens * inner * (inner + whole.shape.hidden) + inner**3 / 3
    seconds = passed.seconds + 2 * sums / whole.device.flops[4] + written.seconds
    return Estimate(seconds, passed.memory + 8 * inner * (3 * inner + 2 * whole.shape.hidden), written.disk)


def rewrites(
    cost_model: CostModel, rows: int, prompt: float, new: float, longest: float, batch: int, chunk: int
) -> Estimate:
    """The unpruned model answers `rows` prompts of `prompt` tokens with `new` tokens, some with `longest`.

    The batch stays full (see `decoding`): a row that ends makes room, and rows are read as some places are free. At the
    end of a chunk of rows the longest is waited for. Drafts, which are for small batches, are not counted.
    """
    whole, rest = divmod(rows, chunk)
    sizes = {chunk: whole, rest: 1} if rest else {chunk: whole}
    steps = sum(number * ((size / min(batch, size) - 1) * new + longest) for size, number in sizes.items())
    reads = rows / max(1, batch // REFILL)
    seconds, memory = cost_model.answering(rows, prompt, longest, batch, reads, steps)
    return Estimate(
        cost_model.opening + seconds, cost_model.weights + memory, rows * (prompt + new) * CHARACTERS_PER_TOKEN
    )


def targets(rows: int, length: float) -> Estimate:
    """Rows are read, compared and written; no model."""
    memory = PROCESS + 4 * rows * length * CHARACTERS_PER_TOKEN
    return Estimate(1 + rows / 2_000, memory, rows * length * 4, on_cpu=True)


def adapter_parameters(shape: Shape, blocks: int, rank: int, names: list[str]) -> int:
    """Weights of LoRA matrices on the named linear layers of every block; a name not known here counts as all."""
    known = [name for name in names if name in shape.linear]
    chosen = known if known and len(known) == len(names) else list(shape.linear)
    return blocks * rank * sum(sum(shape.linear[name]) for name in chosen)


def head_and_norms_parameters(shape: Shape, blocks: int) -> int:
    """Weights of the head, or of the embeddings it is tied to, and of two norms a block and the last one."""
    return shape.vocabulary * shape.hidden + (2 * blocks + 1) * shape.hidden


@dataclass(frozen=True)
class Training:
    """What of a student is trained, and how: `trained` weights, gradients through the last `reach` blocks (None: all).

    `whole`: every weight is trained, in float32. `four_bit`: the frozen base is held in nf4. `recomputed`: one state a
    block is kept, and the rest computed again.
    """

    trained: int
    reach: int | None = None
    whole: bool = False
    four_bit: bool = False
    recomputed: bool = False


NF4_BYTES = 4 / 8 + 1 / 64 + 4 / (64 * 256)
"""A weight in nf4: 4 bits, a scale of 8 bits for 64 of them, and one of 32 bits for 256 scales (arXiv 2305.14314)."""


def base_bytes(cost_model: CostModel, training: Training) -> float:
    """Bytes of the weights that are held beside the trained ones; in 4 bits, embeddings, head and norms stay whole."""
    if training.whole:
        return 0.0
    if not training.four_bit:
        return cost_model.weights
    shape = cost_model.shape
    linear = cost_model.blocks * (shape.block_parameters(shape.experts) - 2 * shape.hidden)
    return cost_model.weights - linear * (cost_model.width - NF4_BYTES)


def tuned(
    cost_model: CostModel,
    training: Training,
    rows: int,
    length: float,
    batch: int,
    micro_batch_tokens: int,
    teacher: CostModel | None = None,
    epochs: int = 1,
    longest: float = 0,
) -> Estimate:
    """Forward, and backward as far down as something is trained; Adam on what is trained, all of it in float32.

    `rows` counts every epoch's, `longest` are the tokens of the longest, which may be more than a pass is meant to
    have. Blocks below the lowest trained one are passed in one epoch alone, where their states can be kept for the
    others. A frozen block's backward makes gradients of its states only, and costs what forward does; one that is
    trained whole costs 2, one that is recomputed 1 more. LoRA's own products, 1% at rank 16, and unpacking 4 bits are
    not counted. A trained weight takes 16 bytes (value, gradient, two moments), and in 16 bits the copy that autocast
    keeps. What backward keeps of a block's activations is most of the rest.

    Logits are there for a pass, or for a chunk of it (see `chunks`). A `teacher` is opened too and reads the same
    batches, forward only. Its weights stay, its last states of a pass, and its logits of a chunk beside the student's.
    """
    tokens, together = rows * length, max(longest, min(micro_batch_tokens, batch * length))
    reach = cost_model.blocks if training.reach is None else training.reach
    backward = (2.0 if training.whole else 1.0) + (1.0 if training.recomputed else 0.0)
    below = (cost_model.blocks - reach) / cost_model.blocks
    if tokens / epochs * cost_model.width * cost_model.shape.hidden > KEPT_STATES:
        epochs = 1
    cost = 1 - below * (1 - 1 / epochs) + backward * (1 - below)
    seconds = cost_model.opening + cost_model.passes(tokens, length, tokens / together, cost=cost)
    block = cost_model.kept_by_backward(max(length, longest))
    kept = reach * cost_model.width * cost_model.shape.hidden + block if training.recomputed else reach * block
    held = training.trained * (16 if cost_model.width == BYTES["float32"] else 16 + cost_model.width)
    cut = teacher is not None or is_cut(together, cost_model.shape.vocabulary)
    shown = min(together, CHUNK_TOKENS) if cut else together
    memory = base_bytes(cost_model, training) + held + together * kept + 2 * cost_model.logits(shown)
    if teacher:
        seconds += teacher.weights / teacher.device.disk + teacher.passes(tokens, length, tokens / together)
        memory += teacher.weights + together * teacher.width * teacher.shape.hidden + 2 * teacher.logits(shown)
    return Estimate(seconds, memory, 4 * training.trained)


def merged(cost_model: CostModel, written: CostModel, students: int, in_full: bool, method: str) -> Estimate:
    """The base is read, some passes over each tensor are made in float32, and the result is written; on the CPU.

    Of the largest tensor there are the base's in two widths, each student's and what it adds, and what `method` makes
    of them: SLERP of light adapters is linear, two products and their sum; TIES trims, with places of 64 bits. Students
    trained in full are read too, in float32; the embeddings are then the largest.
    """
    shape, parameters = cost_model.shape, cost_model.shape.parameters(cost_model.blocks)
    passes = 10 * BYTES["float32"] * parameters * (1 + students) / DEVICES["cpu"].bandwidth
    read = BYTES["float32"] * parameters * students if in_full else 0
    largest = shape.hidden * (max(shape.vocabulary, shape.intermediate) if in_full else shape.intermediate)
    made = {"slerp": 3, "linear": 1, "task_arithmetic": 2, "ties": 6 + students}[method]
    tensors = (cost_model.width + BYTES["float32"] * (1 + 2 * students + made)) * largest
    if written.width > cost_model.width:  # the embeddings are not copied by their bytes
        tensors = max(tensors, (cost_model.width + written.width) * shape.hidden * shape.vocabulary)
    moved = cost_model.weights + written.weights + read
    return Estimate(1 + passes + moved / cost_model.device.disk, PROCESS + tensors, written.weights, on_cpu=True)


@dataclass(frozen=True)
class Task:
    """An evaluation task: items, requests an item, tokens of a request as shown, and if it is answered freely, `new`.

    `choice`: tokens of a request that the item's others do not begin with; `shared`: those that all items of a task
    begin with. `parts` counts the tasks of a group that is known by one name: a limit holds for each of them. `alike`:
    the same examples are shown before all items.
    """

    items: int
    requests: float
    tokens: float
    new: int = 0
    parts: int = 1
    choice: float = 0.0
    shared: float = 0.0
    alike: bool = False

    def limited(self, limit: int | None) -> int:
        """Items left by a limit; for parts of different sizes, at most so many."""
        return self.items if limit is None else min(self.items, limit * self.parts)


TASKS = {
    "arc_challenge": Task(1172, 4, 45, choice=8),
    "hellaswag": Task(10042, 4, 90, choice=33),
    "truthfulqa_mc2": Task(817, 7.2, 195, choice=14, shared=170),
    "mmlu": Task(14042, 1, 115, parts=57, alike=True),
    "winogrande": Task(1267, 2, 27, choice=10),
    "gsm8k": Task(1319, 1, 130, 256),
    "arc_easy": Task(2376, 4, 40, choice=7),
    "boolq": Task(3270, 1, 160),
    "openbookqa": Task(500, 4, 25, choice=7),
    "piqa": Task(1838, 2, 35, choice=20),
    "race": Task(1045, 4, 450, choice=8),
    "social_iqa": Task(1954, 3, 35, choice=6),
    "crows_pairs_english": Task(1508, 2, 20, choice=14),
}
"""The tasks' own sizes; lengths as measured on their rows at about 4 characters a token, RACE's from memory. Answers of
one token to the same question are one request (mmlu, boolq)."""

OTHER_TASK, ONE_OF_A_GROUP = Task(1000, 4, 100, choice=8), 250
"""A task not known here, and items of one that belongs to a group (MMLU's subjects have 246 on average)."""

SCORED = 8
"""Tokens of a pass over choices to one that is scored, at least."""

EMBEDDED_TASK = Task(1000, 1, 100, 96)
"""One of the embedded ones, whose items are a setting."""


def tasks_of(entries: Mapping[str, tuple[int, int, bool]]) -> list[Task]:
    """Tasks and groups by name, from (tasks in it, examples shown before each item, whether they are the same ones)."""
    tasks = []
    for name, (parts, shots, alike) in entries.items():
        other = replace(OTHER_TASK, alike=alike)
        if parts > 1:
            other = replace(other, items=ONE_OF_A_GROUP * parts, parts=parts)
        task = TASKS.get(name, other)
        shown = shots * task.tokens
        shared = task.shared + (shown if task.alike else 0)
        tasks.append(replace(task, tokens=task.tokens + shown, shared=shared))
    return tasks


def likelihoods(cost_model: CostModel, task: Task, limit: int | None, batch: int) -> tuple[float, float]:
    """(seconds, bytes beside the weights) of a task's requests, each token computed once (see `prefixes`).

    A beginning that is long fills a pass alone, and so do the choices after it; of shorter ones those of a length go
    together, about half of what fits. Logits are made of what is scored.
    """
    items = task.limited(limit)
    own, choices = task.tokens - task.shared, (task.requests - 1) * task.choice
    rows = max(1.0, min(batch, MOST_TOKENS / own))
    group = rows if not choices else 1.0 if own >= LONG else max(1.0, rows / 2)
    passes = items * (2 if choices else 1) / group
    device, shape = cost_model.device, cost_model.shape
    begun = cost_model.passes(task.parts * task.shared, task.shared, task.parts if task.shared else 0, head=False)
    after = cost_model.passes(items * (own + choices), task.tokens + task.shared, passes, head=False)
    scored = items * task.requests * (task.choice or 1) * shape.head_flops / device.flops[cost_model.width]
    cache = rows * task.tokens * shape.cache_bytes(cost_model.blocks, cost_model.width)
    states = cost_model.activations(max(rows * own, task.shared), task.tokens)
    return begun + after + scored, states + cache + cost_model.logits(rows * own / SCORED)


def evaluated(
    cost_model: CostModel, tasks: list[Task], limit: int | None, batch: int, new: int | None = None
) -> Estimate:
    """Every request of every task; `new` bounds answers. An adapter is merged before the device holds anything."""
    seconds, memory = cost_model.opening, 0.0
    for task in tasks:
        if task.new:
            length = min(task.new, new or task.new)
            spent, held = cost_model.generation(task.limited(limit), task.tokens, length, batch)
        else:
            spent, held = likelihoods(cost_model, task, limit, batch)
        seconds, memory = seconds + spent, max(memory, held)
    items = sum(task.limited(limit) for task in tasks)
    return Estimate(seconds, cost_model.weights + memory, 2e3 * items)
