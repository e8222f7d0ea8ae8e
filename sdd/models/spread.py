"""A model that no device holds whole: its blocks lie on several, and what fits on none on the CPU or the disk.

By accelerate, which transformers asks for it: each module's inputs go to where the module lies, and weights from the
CPU or the disk come to the device for one pass. Stock outputs, slower. Knows nothing of what is computed.
"""

import re
import tempfile
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from sdd.errors import UserError

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How accelerate fills devices: `auto` is `balanced`, `sequential` fills one after another."""
DEVICE = re.compile(r"cpu|gpu\d{1,3}")
AMOUNT = re.compile(r"\d{1,9}(\.\d{1,6})?(KiB|MiB|GiB|KB|MB|GB)")


@dataclass(frozen=True)
class Spread:
    """Over all devices that are visible, by the map; `max_memory` is what of each a model may take, such as
    "gpu0" or "cpu", what is free where nothing is said."""

    device_map: str
    max_memory: dict[str, str] = field(default_factory=dict)
    accelerator: str = "gpu"

    def options(self, held: ExitStack) -> dict[str, Any]:
        """What `from_pretrained` is told; weights that are written anew for the disk are there as long as `held`."""
        return {
            "device_map": self.device_map,
            "max_memory": self._memory(),
            "offload_folder": held.enter_context(tempfile.TemporaryDirectory(prefix="sdd-offload-")),
        }

    def _memory(self) -> dict[int | str, Any] | None:
        if self.max_memory:
            return {key if key == "cpu" else int(key[3:]): amount for key, amount in self.max_memory.items()}
        if self.accelerator == "gpu":
            return None
        from accelerate.utils import get_max_memory

        return {"cpu": get_max_memory()["cpu"]}

    def place(self, model: Any) -> Any:
        """A model that lies on the CPU, put where there is room."""
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        memory, whole = self._memory(), model._no_split_modules
        if self.device_map != "sequential":
            low_zero = self.device_map == "balanced_low_0"
            memory = get_balanced_memory(model, memory, whole, low_zero=low_zero)
        held = ExitStack()
        places = infer_auto_device_map(model, memory, whole)
        offloaded = held.enter_context(tempfile.TemporaryDirectory(prefix="sdd-offload-"))
        return self.settled(dispatch_model(model, places, offload_dir=offloaded), held)

    def settled(self, model: Any, held: ExitStack) -> Any:
        """The model, whose parts give what they make to where their input was; `held` goes when it does."""
        from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module

        weakref.finalize(model, held.close)
        if model.device.type == "meta":
            raise UserError("trainer.max_memory leaves the embeddings no room on any device; raise it")
        for part in (model.get_decoder(), model.get_output_embeddings()):
            hook = getattr(part, "_hf_hook", None)
            while isinstance(hook, SequentialHook):
                hook = hook.hooks[0]
            if isinstance(hook, AlignDevicesHook):
                hook.io_same_device = True
            else:
                add_hook_to_module(part, AlignDevicesHook(io_same_device=True))
        return model
