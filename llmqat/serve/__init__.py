"""How a packed model runs.

`attach` is the one place that patches a model. A packed model is an ordinary transformers model whose linear layers
are `PackedLinear`, and it runs everywhere. On a CPU, a model of a known family (`families`, and `covered` that it
holds nothing that its row does not name) also runs natively: `forward` replaces the forward of the decoder stack,
which `stacks` finds beside towers, too, by one call of the library for all blocks, where `calls` finds nothing else to
compute (`blocks` builds the decoder that borrows the weights, by `parts` that the row names; `borrowed` notices when
the model holds others, `cache_views` keeps transformers' cache pointing at what the library writes), and `generate`
runs greedy search and sampling token by token (`step`), of several prompts together (`batch`). What the native code
does not compute, it leaves to transformers, on the same weights and the same cache; `paths` counts which of both ran,
and why. `int8_cache` stores keys and values as codes, `activations` quantizes the input of layers that were trained
without.
"""
