"""Blocks whose down projection can be refitted: what is added to its output is added to the block's, unchanged."""

from typing import Any

from sdd.architectures.configs import cut_config
from sdd.architectures.mlps import DOWN
from sdd.architectures.trees import block_list, facts, skeleton


def down_projection(block: Any) -> str | None:
    """Where in a block the last linear layer of its one MLP is, such as `mlp.down_proj`; None for any other MLP.

    That of a single expert, shared or not, lies deeper and is none.
    """
    import torch

    linears = (name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear))
    projections = [name for name in linears if name.count(".") == 1 and name.endswith(DOWN)]
    return projections[0] if len(projections) == 1 else None


def refittable(config: dict[str, Any], where: str) -> dict[int, str]:
    """Blocks whose output is their down projection's plus what does not depend on it, and where that projection is.

    Read off the module tree, then tried: in a model of the one block, all its weights zero and so without memory, what
    is added to the projection's output has to come out of the block unchanged. A norm or a scale in between shows.
    `config` is explicit.
    """
    blocks = block_list(skeleton(config, where))
    verdicts: dict[str, bool] = {}
    projections = {}
    for index, block in enumerate(blocks):
        name = down_projection(block)
        if name is None:
            continue
        kind = repr(sorted(facts(block).items()))
        if kind not in verdicts:
            verdicts[kind] = _adds_as_it_is(skeleton(cut_config(config, [index]), where), name)
        if verdicts[kind]:
            projections[index] = name
    return projections


def _make_zeros(module: Any) -> None:
    """Put zeros in place of a module's own tensors, each a single number however large its shape."""
    import torch

    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                zeros = torch.zeros(()).expand(tensor.shape)
                table[name] = torch.nn.Parameter(zeros, requires_grad=False) if table is module._parameters else zeros


def _adds_as_it_is(model: Any, name: str) -> bool:
    """Whether what is added to the output of the only block's module `name` is added to the block's output."""
    import torch

    body, (block,) = model.get_decoder(), block_list(model)
    width = block.get_submodule(name).out_features
    for child in body.children():
        if child is not model.get_input_embeddings():
            for module in child.modules():
                _make_zeros(module)
    draw = torch.Generator().manual_seed(0)
    states, added = (torch.randn(1, 3, width, generator=draw) for _ in range(2))
    outputs: list[Any] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    def add(module: Any, arguments: Any, output: Any) -> Any:
        return output + added

    block.register_forward_hook(keep)
    try:
        with torch.no_grad():
            body(inputs_embeds=states, use_cache=False)
            block.get_submodule(name).register_forward_hook(add)
            body(inputs_embeds=states, use_cache=False)
    except Exception:
        return False  # more than states goes in, or not these come out: a block of no kind known here
    return bool(torch.allclose(outputs[1] - outputs[0], added, atol=1e-4))
