"""Check that a model under a method is called as the method's hooks expect.

A hook that does not fire, or that reads an argument under a name of yesterday, drops
nothing or drops it at every step, and the model answers all the same. The guard of a block
counts instead: one prompt is read for each `generate`, every layer is called once and gets
as many tokens as the method says, and the cache then holds that many. All of these numbers
are known to the host, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from weakref import WeakSet

from zipeval.engine import hf_names
from zipeval.errors import RunError
from zipeval.utils.lazy import torch

# Models under a method inside the decoder: only the first layer then has to get all that enters.
reduced_inside: WeakSet = WeakSet()


class Applied:
    """Tell what a method left of the prompts that its model read last.

    It is what a block is given: `with method.applied(model) as applied:`.
    """

    def __init__(self):
        self._count: Callable[[], list[list[int]]] = list

    def record(self, count: Callable[[], list[list[int]]]) -> None:
        """Take a function that counts the prompts of this call, for when somebody asks."""
        self._count = count

    @property
    def visual_tokens(self) -> list[list[int]]:
        """Return the visual tokens that entered each decoder layer, prompt by prompt.

        The prompts are those of the batch that was read last.
        """
        return self._count()

    def __repr__(self) -> str:
        return f"Applied(visual_tokens={self.visual_tokens})"


def check_scores(method: str, no_numbers: list[torch.Tensor]) -> None:
    """Raise RunError if one of the scores that tokens were chosen by holds NaN.

    Args:
        no_numbers: bool for each score, on any device; empty behind the check.
    """
    # On the host: the stages of a method may be on several devices.
    flags = [flag.cpu() for flag in no_numbers]
    no_numbers.clear()
    if any(flags):
        raise RunError(
            f"{method}: the scores that it keeps tokens by are not numbers (NaN), so that nothing can be told from its "
            "answers. Look at the weights, or run this with model.dtype=float32 or bfloat16"
        )


class Guard:
    """Watch the calls of one model, from the moment that its hooks are registered.

    Args:
        model: the model that a method is applied to.
        method: the method's name, for messages.
        inside: whether the method acts between decoder layers.

    Attributes:
        lengths: (layers) tokens of the longest prompt that have to enter each layer in
            the call in progress. A method inside the decoder lowers them where tokens
            leave.
    """

    def __init__(self, model, method: str, inside: bool):
        self.model, self.method, self.inside = model, method, inside
        self.layers = hf_names.decoder(model).layers
        self.lengths: list[int] = []
        self._running = self._checked = False
        self._scores: list[torch.Tensor] = []
        # Prompts that `generate` has read so far, None outside of it; and how many it may.
        self._prompts: int | None = None
        self._most = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Check every call in this block.

        Open it behind the method's own hooks, so that it sees what they leave.

        Raises:
            IncompatibleError: in a call that does not go as the hooks expect.
            ValueError: where the decoder is called without the model that it belongs to.
        """
        # `_stop` runs after an exception too; `_end` has nothing to check then.
        hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end),
            self.model.register_forward_hook(self._stop, always_call=True),
        ]
        for number, layer in enumerate(self.layers):
            hooks.append(
                layer.register_forward_pre_hook(self._enter(number), with_kwargs=True)
            )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def generating(self, inputs: dict) -> Iterator[None]:
        """Check that the `generate` in this block reads its prompt once, unless it was told to keep no cache.

        Raises:
            IncompatibleError: if it reads its prompt again for a later token, or never calls the model.
        """
        use_cache = hf_names.generation_setting(self.model, inputs, "use_cache")
        is_first_turn = hf_names.is_empty(hf_names.given_cache(inputs))
        # Without a cache every step reads the prompt anew; a later turn reads none.
        self._prompts = 0
        self._most = inf if use_cache is False else int(is_first_turn)
        try:
            yield
            if is_first_turn and not self._prompts:
                self._refuse(
                    "generate() does not call the model, so that no token was dropped"
                )
        finally:
            self._prompts = None

    def check_model_is_called(self) -> None:
        """Raise ValueError where a layer is called without the whole model, which has the ids."""
        if not self._running:
            raise ValueError(
                f"{self.method}: the decoder was called without its model, so that nothing tells visual tokens from "
                "text. Call model(...) or model.generate(...)"
            )

    def check_later(self, no_numbers: list[torch.Tensor]) -> None:
        """Take a list of flags for scores that hold NaN, to be read when the prompt is.

        It may still grow until then.
        """
        self._scores = no_numbers

    def _begin(self, module, args, kwargs) -> None:
        """Begin a call: a forward pre-hook of the model."""
        # The names of arguments do not change from call to call.
        if not self._checked:
            hf_names.check_arguments(self.model, self.layers[0])
            self._checked = True
        ids = hf_names.given_ids(args, kwargs)
        tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        self.lengths = [tokens] * len(self.layers)
        self._cache = hf_names.given_cache(kwargs)
        # A prompt is read where nothing is cached yet.
        is_prefill = hf_names.is_empty(self._cache)
        # In a decoding step nothing leaves: two layers tell of all, and the step stays
        # cheap.
        last = len(self.layers) - 1
        self._looked_at = range(len(self.layers)) if is_prefill else sorted({0, last})
        self._running, self._entered = True, set()
        self._before = self._count_entries(self._cache)
        # A second prompt in a `generate` is a step that lost its cache.
        if self._prompts is not None and is_prefill:
            self._prompts += 1
            if self._prompts > self._most:
                self._refuse(
                    "a decoding step does not go on with the cache of its prompt"
                )

    def _enter(self, number: int):
        """Return a forward pre-hook of a layer that checks what enters it."""

        def check(module, args, kwargs) -> None:
            self.check_model_is_called()
            self._entered.add(number)
            if number not in self._looked_at:
                return
            call = hf_names.LayerCall.read(args, kwargs)
            # The model may make a cache of its own, but must not drop one that it was given.
            if self._cache is not None and call.cache is not self._cache:
                self._refuse(
                    f"the cache that the model was given does not reach layer {number}"
                )
            length, expected = call.hidden.shape[1], self.lengths[number]
            if self._knows(number) and length != expected:
                self._refuse(
                    f"{length} tokens enter layer {number}, and {expected} should"
                )

        return check

    def _end(self, module, args, output) -> None:
        """Check what a call did: a forward hook of the model."""
        # A layer that a model skips, or calls by another way than `__call__`.
        missing = sorted({*range(len(self.layers))} - self._entered)
        if missing:
            self._refuse(f"the hooks on layers {missing} did not fire")
        after = self._count_entries(self._cache)
        for number in self._before.keys() & after.keys():
            cached = after[number] - self._before[number]
            if self._knows(number) and cached != self.lengths[number]:
                self._refuse(
                    f"layer {number} cached {cached} tokens, and {self.lengths[number]} entered it"
                )
        check_scores(self.method, self._scores)

    def _stop(self, module, args, output) -> None:
        """End a call, after an exception too: a forward hook of the model.

        The guard holds no cache from then on, and no scores by which a later call would be judged.
        """
        self._running, self._cache, self._scores = False, None, []

    def _knows(self, number: int) -> bool:
        """Tell whether `lengths` counts for a layer.

        A method before the decoder does not know of one inside it.
        """
        is_reduced_inside = self.model in reduced_inside
        return self.inside or number == 0 or not is_reduced_inside

    def _count_entries(self, cache) -> dict[int, int]:
        """Return the number of cache entries of each layer that is looked at.

        None of a static cache's: the device counts them, and would be waited for.
        """
        entries = {}
        if cache is None:
            return entries
        for number in self._looked_at:
            count = cache.get_seq_length(number)
            if isinstance(count, int):
                entries[number] = count
        return entries

    def _refuse(self, problem: str) -> None:
        hf_names.incompatible(
            f"{self.method} cannot be used on this {type(self.model).__name__}: {problem}"
        )
