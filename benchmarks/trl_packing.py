"""The other side of `finetuning.py`: TRL trains on packed rows, in an environment of its own.

    PYTHON benchmarks/trl_packing.py FOLDER

`FOLDER` holds `model/`, `adapter/` and `case.json`. It trains once for every line on stdin, always from the same
adapter, and answers with a line: seconds of the processor, or of a GPU, in `SFTTrainer.train`, and every step's loss.

TRL packs a whole dataset, and draws blocks of it for a step: a step has the same rows as elsewhere if it has all of
them. So the rows are those of one step, shown in every one. What its documentation names as fastest is taken (best fit
decreasing, no padding, attention kept within a row, its fused head), less what a CPU is slower with: one block a pass,
as blocks laid end to end would look at each other before they are masked; float32; no gradient checkpointing. The same
on a GPU: its faster kernels take 16 bits alone, in which losses could not be compared.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import timed

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def trained(student: Any, tokenizer: Any, case: dict[str, Any], folder: str) -> tuple[float, list[float]]:
    """(seconds, the loss of every step)."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer, pack_dataset  # type: ignore[import-not-found]

    losses: list[float] = []

    class Noting(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, *words: Any, **named: Any) -> Any:
            loss = super().compute_loss(*words, **named)
            losses.append(float(loss.detach()))
            return loss

    rows = Dataset.from_list(case["rows"])
    blocks = len(pack_dataset(rows, case["block"], "bfd"))
    arguments = SFTConfig(
        output_dir=folder,
        packing=True,
        packing_strategy="bfd",
        max_length=case["block"],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=blocks,
        num_train_epochs=len(case["rates"]),
        max_grad_norm=case["clip_norm"],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=case["device"] == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, **case["adamw"])
    rates = [*case["rates"], 0.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step])
    trainer = Noting(
        student, arguments, train_dataset=rows, processing_class=tokenizer, optimizers=(optimizer, scheduler)
    )
    trainer.remove_callback(PrinterCallback)
    seconds, _ = timed(trainer.train, case["device"])
    return seconds, [sum(losses[at : at + blocks]) for at in range(0, len(losses), blocks)]


def main() -> None:
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    case = json.loads((folder / "case.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    student = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).to(case["device"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    adapter = {name: one for name, one in student.named_parameters() if one.requires_grad}
    initial = {name: one.detach().clone() for name, one in adapter.items()}
    for _ in sys.stdin:
        for name, one in adapter.items():
            one.data.copy_(initial[name])
            one.grad = None
        with tempfile.TemporaryDirectory() as scratch:
            seconds, losses = trained(student, tokenizer, case, scratch)
        print(json.dumps({"seconds": seconds, "losses": losses}), file=answers, flush=True)


if __name__ == "__main__":
    main()
