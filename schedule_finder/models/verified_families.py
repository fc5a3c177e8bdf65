"""Families for which the tests show that profiling works and pruning is exact.

The runtime does not read this table: other stock models are pruned as well, unless they are refused by name. How to
add a family: docs/new_family.md.
"""

from __future__ import annotations

from dataclasses import dataclass

_RECURRENT = {"linear_attention", "conv"}


@dataclass(frozen=True)
class VerifiedFamily:
    """Facts about the small instance of a family in the tests.

    Attributes:
        name: common name.
        model_class: the stock transformers class.
        media: media in the prompts of the tests.
        kinds: kinds of decoder layers.
        layers: module path of the decoder layers.
        since: oldest supported transformers release that has the class.
        note: peculiarity of the test.
    """

    name: str
    model_class: str
    media: tuple[str, ...] = ("image",)
    kinds: tuple[str, ...] = ("full_attention",)
    layers: str = "model.language_model.layers"
    since: str = "5.17"
    note: str = ""

    @property
    def reference(self) -> str:
        """Reference for pruned generation: masking, or compaction where a layer has a recurrent state."""
        return "compaction" if _RECURRENT & set(self.kinds) else "masking"

    @property
    def releases(self) -> tuple[str, ...]:
        """The transformers releases that the tests ran on."""
        return tuple(release for release in ("5.17", "5.23") if release >= self.since)


VERIFIED: dict[str, VerifiedFamily] = {
    "llava": VerifiedFamily("LLaVA-1.5", "LlavaForConditionalGeneration"),
    "qwen2_vl": VerifiedFamily("Qwen2-VL", "Qwen2VLForConditionalGeneration", media=("image", "video")),
    "qwen2_5_vl": VerifiedFamily(
        "Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", media=("image", "video")
    ),
    "llava_next": VerifiedFamily("LLaVA-NeXT", "LlavaNextForConditionalGeneration"),
    "llava_onevision": VerifiedFamily(
        "LLaVA-OneVision", "LlavaOnevisionForConditionalGeneration", media=("image", "video")
    ),
    "llava_next_video": VerifiedFamily(
        "LLaVA-NeXT-Video", "LlavaNextVideoForConditionalGeneration", media=("image", "video")
    ),
    "granite4_vision": VerifiedFamily("Granite 4 Vision", "Granite4VisionForConditionalGeneration"),
    "qwen3_vl": VerifiedFamily("Qwen3-VL", "Qwen3VLForConditionalGeneration", media=("image", "video")),
    "qwen3_vl_moe": VerifiedFamily(
        "Qwen3-VL-MoE", "Qwen3VLMoeForConditionalGeneration", media=("image", "video")
    ),
    "qwen3_5": VerifiedFamily(
        "Qwen3.5",
        "Qwen3_5ForConditionalGeneration",
        media=("image", "video"),
        kinds=("full_attention", "linear_attention"),
    ),
    "qwen3_5_moe": VerifiedFamily(
        "Qwen3.5-MoE",
        "Qwen3_5MoeForConditionalGeneration",
        media=("image", "video"),
        kinds=("full_attention", "linear_attention"),
    ),
    "internvl": VerifiedFamily("InternVL", "InternVLForConditionalGeneration"),
    "glm4v": VerifiedFamily("GLM-4V", "Glm4vForConditionalGeneration", media=("image", "video")),
    "glm46v": VerifiedFamily("GLM-4.6V", "Glm46VForConditionalGeneration", media=("image", "video")),
    "glm4v_moe": VerifiedFamily("GLM-4V-MoE", "Glm4vMoeForConditionalGeneration", media=("image", "video")),
    "ernie4_5_vl_moe": VerifiedFamily(
        "Ernie 4.5 VL", "Ernie4_5_VLMoeForConditionalGeneration", media=("image", "video")
    ),
    "idefics3": VerifiedFamily(
        "Idefics3", "Idefics3ForConditionalGeneration", layers="model.text_model.layers"
    ),
    "smolvlm": VerifiedFamily("SmolVLM", "SmolVLMForConditionalGeneration", layers="model.text_model.layers"),
    "aya_vision": VerifiedFamily(
        "Aya Vision", "AyaVisionForConditionalGeneration", kinds=("full_attention", "sliding_attention")
    ),
    "cohere2_vision": VerifiedFamily(
        "Command A Vision",
        "Cohere2VisionForConditionalGeneration",
        kinds=("full_attention", "sliding_attention"),
    ),
    "ovis2": VerifiedFamily("Ovis2", "Ovis2ForConditionalGeneration"),
    "deepseek_vl": VerifiedFamily("DeepSeek-VL", "DeepseekVLForConditionalGeneration"),
    "mistral3": VerifiedFamily("Mistral 3 (Pixtral)", "Mistral3ForConditionalGeneration"),
    "minicpmv4_6": VerifiedFamily(
        "MiniCPM-V 4.6",
        "MiniCPMV4_6ForConditionalGeneration",
        media=("image", "video"),
        kinds=("full_attention", "linear_attention"),
    ),
    "lfm2_vl": VerifiedFamily("LFM2-VL", "Lfm2VlForConditionalGeneration", kinds=("full_attention", "conv")),
    "gemma3": VerifiedFamily(
        "Gemma 3", "Gemma3ForConditionalGeneration", kinds=("full_attention", "sliding_attention")
    ),
    "gemma3n": VerifiedFamily(
        "Gemma 3n",
        "Gemma3nForCausalLM",
        kinds=("full_attention", "sliding_attention"),
        layers="model.layers",
        note="text model; vision tokens named by a mask",
    ),
    "gemma4": VerifiedFamily(
        "Gemma 4", "Gemma4ForConditionalGeneration", kinds=("full_attention", "sliding_attention")
    ),
    "gemma4_own_keys": VerifiedFamily(
        "Gemma 4, no shared keys",
        "Gemma4ForConditionalGeneration",
        kinds=("full_attention", "sliding_attention"),
    ),
    "gemma4_large": VerifiedFamily(
        "Gemma 4, large", "Gemma4ForConditionalGeneration", kinds=("full_attention", "sliding_attention")
    ),
    "paligemma": VerifiedFamily("PaliGemma", "PaliGemmaForConditionalGeneration"),
    "paligemma2": VerifiedFamily(
        "PaliGemma 2",
        "PaliGemmaForConditionalGeneration",
        kinds=("full_attention", "sliding_attention"),
        note="eager attention only: soft-capped logits",
    ),
    "molmo2": VerifiedFamily("Molmo2", "Molmo2ForConditionalGeneration", since="5.23"),
    "llama4": VerifiedFamily(
        "Llama 4",
        "Llama4ForConditionalGeneration",
        kinds=("full_attention", "chunked_attention"),
        layers="language_model.model.layers",
    ),
    "phi4_multimodal": VerifiedFamily("Phi-4-multimodal", "Phi4MultimodalForCausalLM", layers="model.layers"),
    "phi4_sliding": VerifiedFamily(
        "Phi-4-multimodal, sliding",
        "Phi4MultimodalForCausalLM",
        kinds=("sliding_attention",),
        layers="model.layers",
    ),
    "kimi_k25": VerifiedFamily("Kimi-K2.5", "Kimi_K25ForConditionalGeneration"),
}
"""Key of the small instance in the tests to the family."""
