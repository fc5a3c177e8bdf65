"""vLLM's processors with fewer placeholder tokens: the part that the frontend runs, before the image is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement

from pruning_runtime.errors import ScheduleError
from pruning_runtime.vllm.limits import entry_of
from pruning_runtime.vllm.setting import (
    REQUEST_OPTIONS,
    Setting,
    decode_setting,
    server_setting,
    without_request_options,
)


def setting_field(modality: str) -> str:
    """Name of the field that holds the setting of an image or video, as bytes."""
    return f"adaptinfer_{modality}_setting"


def tokens_field(modality: str) -> str:
    """Name of the field that holds the vision tokens of an image or video before pruning."""
    return f"adaptinfer_{modality}_tokens"


def setting_in(field: torch.Tensor) -> Setting:
    """The setting that one item's `setting_field` holds."""
    return decode_setting(bytes(field.tolist()))


class PruningProcessor:
    """Mixin before a processor of vLLM; a subclass says how many tokens an image or video has.

    The setting of a request travels in the arguments of each call and with the items. Nothing is kept on the object,
    which several threads may use at once.
    """

    info: Any

    def vision_token_ids(self) -> Mapping[str, int]:
        """Placeholder token of each modality that is pruned."""
        raise NotImplementedError

    def num_vision(self, modality: str, mm_items: Any, hf_inputs: Any) -> list[int]:
        """Vision tokens of every item of a modality before pruning."""
        raise NotImplementedError

    def _setting(self, options: Mapping[str, object]) -> Setting | None:
        """The setting of a request with these ``mm_processor_kwargs``; None on a server that does not prune."""
        entry = entry_of(self.info.get_hf_config())
        if entry is not None:
            return server_setting(entry).changed_by(options)
        if given := [name for name in REQUEST_OPTIONS if options.get(name) is not None]:
            raise ScheduleError(
                f"mm_processor_kwargs: {given[0]!r} needs a server that prunes; start it with --hf-overrides "
                '\'{"adaptinfer": {"keep_ratio": 1.0}}\''
            )
        return None

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        setting = self._setting(hf_kwargs)
        found = super()._apply_hf_processor_main(mm_items, without_request_options(hf_kwargs))  # type: ignore[misc]
        if setting is None:
            return found
        encoded = torch.tensor(list(setting.encode()), dtype=torch.uint8)
        for modality in self.vision_token_ids():
            if modality in mm_items and len(mm_items[modality]):
                tokens = self.num_vision(modality, mm_items, found)
                found[setting_field(modality)] = encoded.expand(len(tokens), -1).contiguous()
                found[tokens_field(modality)] = torch.tensor(tokens)
        return found

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, Any]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))  # type: ignore[misc]
        for modality in self.vision_token_ids():
            for name in (setting_field(modality), tokens_field(modality)):
                fields[name] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        if self._setting(hf_processor_mm_kwargs) is None:
            return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]

        def placeholders(modality: str, token: int, item: int) -> list[int]:
            fields = out_mm_kwargs[modality][item]
            setting = setting_in(fields[setting_field(modality)].data)
            return [token] * setting.kept(int(fields[tokens_field(modality)].data))

        return [
            PromptReplacement(
                modality=modality,
                target=[token],
                replacement=lambda item, modality=modality, token=token: placeholders(modality, token, item),
            )
            for modality, token in self.vision_token_ids().items()
        ]

    def _get_mm_hashes(self, inputs: Any) -> Mapping[str, list[str]]:
        """Identities of the items in all caches; vLLM's own lack the server's setting."""
        hashes: Mapping[str, list[str]] = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        setting = self._setting(inputs.hf_processor_mm_kwargs)
        if setting is None:
            return hashes
        tag = setting.encode().decode()
        return {modality: [f"{name}:{tag}" for name in names] for modality, names in hashes.items()}
