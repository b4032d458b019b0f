"""Whether every op is right, at shapes that fill no tile: bfloat16 on a GPU, where nothing else can check it."""

from collections.abc import Iterator

from attention_sides import AttentionShape
from bench_kernels import check_sides
from harness import Result, compute_dtype
from kernel_ops import OURS, Op, attention_op, decode_op, head_op, loss_op, rope_op, sample_op, sides_of
from sample_sides import SETTINGS

from stages import Task, costs_only


def run(task: Task) -> Iterator[Result]:
    """Each op beside plain torch in the same dtype, both against float64; an error of ours may be 1.1 times torch's."""
    result = Result("kernels", task.device)
    for op in shapes_of(task.scale, task.device):
        sides = [side for side in sides_of(op.name, task.device)[0] if side.name in (*OURS, "torch")]
        rows = {}
        with costs_only(result, f"{op.name} {op.shape}"):
            rows, _ = check_sides(op, sides, op.make_inputs(), {})
        result.figures.setdefault(op.name, {})[op.shape] = {
            name: {"errors": row.errors, "fault": row.fault} for name, row in rows.items()
        }
        for name in OURS:
            if name in rows:
                result.checks[f"{op.name} {op.shape}: {name}"] = not rows[name].fault
        yield result


def shapes_of(scale: str, device: str) -> list[Op]:
    """Aligned, one off, and prime."""
    dtype = compute_dtype(device)
    if scale == "full":
        heads = [(1024, 1536, 32_000), (257, 2048, 50_257), (1, 896, 151_936)]
        attention = [
            AttentionShape(8, 8, 700, 324),
            AttentionShape(33, 3, 129, 17),
            AttentionShape(64, 8, 16, 1, 28, 4),
        ]
        tokens, rows, vocabulary = [64, 65_536], [1, 64], 151_936
    else:
        heads, attention = [(67, 48, 501)], [AttentionShape(6, 3, 19, 5, 4, 2, 32)]
        tokens, rows, vocabulary = [128], [64], 501
    return [
        *(head_op(*shape, dtype, device) for shape in heads),
        *(loss_op(count, device) for count in tokens),
        *(attention_op(shape, dtype, device, grouped) for shape in attention for grouped in (True, False)),
        *(decode_op(shape, dtype, device) for shape in attention),
        *(rope_op(count, 12, 2, 128, dtype, device) for count in (1, 300)),
        *(sample_op(count, vocabulary, setting, device) for count in rows for setting in SETTINGS),
    ]
