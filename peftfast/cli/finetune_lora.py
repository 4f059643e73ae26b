"""``finetune --method lora``, ``qlora`` and ``dora``: PEFT's LoRA on fused kernels."""

from typing import TYPE_CHECKING, Any, ClassVar

from .finetune_base import Method, Target

if TYPE_CHECKING:
    from transformers import TrainerCallback

LORA_OPTIONS: dict[str, Any] = {"lora_alpha": None, "lora_dropout": 0.05, "use_rslora": False}


class LoRA(Method):
    """PEFT's LoRA, patched."""

    help = "low-rank adapters"
    options = LORA_OPTIONS
    use_dora: ClassVar[bool] = False

    def adapt(self, model: Any, target: Target) -> Any:
        from peft import LoraConfig, get_peft_model

        import peftfast

        options = target.options
        alpha = options.lora_alpha if options.lora_alpha is not None else options.r
        config = LoraConfig(
            task_type=target.task_type,
            r=options.r,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
            lora_dropout=options.lora_dropout,
            target_modules=target.modules,
            modules_to_save=target.whole or None,
            exclude_modules=target.whole or None,
            use_dora=self.use_dora,
            use_rslora=options.use_rslora,
        )
        model = get_peft_model(model, config)
        # The name that was given, not the folder of the hub's cache that it led to.
        model.peft_config["default"].base_model_name_or_path = str(options.model)
        print(peftfast.patch(model))
        model.print_trainable_parameters()
        return model

    def callbacks(self) -> "list[TrainerCallback]":
        from ..integrations.transformers import PatchCallback

        return [PatchCallback()]  # for what it keeps in checkpoints


class QLoRA(LoRA):
    """LoRA on a 4-bit base."""

    help = "lora on a 4-bit NF4 base"
    packages = {"bitsandbytes": "bitsandbytes"}
    four_bit = True


class DoRA(LoRA):
    """LoRA with trained magnitudes."""

    help = "lora with trained magnitudes"
    use_dora = True
