"""What other tools call our settings, so that a key of theirs leads to ours and not to another that is spelt alike.

The names are those of transformers and TRL, PEFT, axolotl, LLaMA-Factory and torchtune.
"""

from types import MappingProxyType

_PEERS = {
    "base": ("model_name_or_path", "model_name", "model_id", "base_model", "model", "pretrained_model_name_or_path",
             "base_model_name_or_path"),
    "dtype": ("torch_dtype", "model_dtype", "compute_dtype", "bnb_4bit_compute_dtype"),
    "dtype: bfloat16": ("bf16",),
    "quant": ("quantization", "quantization_bit", "quantization_config", "quantize", "bnb_4bit_quant_type"),
    "quant: nf4": ("load_in_4bit", "use_4bit", "qlora"),
    "quant: int8": ("load_in_8bit", "use_8bit"),
    "device": ("device_map",),
    "output": ("output_dir", "out_dir", "save_dir"),
    "data.train": ("dataset", "datasets", "dataset_name", "dataset_path", "train_file", "train_data", "train_dataset",
                   "data_files", "data_path"),
    "data.eval": ("eval_file", "eval_data", "eval_dataset", "val_file", "val_data", "validation_file", "test_datasets",
                  "validation"),
    "data.chat_template": ("apply_chat_template", "use_chat_template"),
    "method.name": ("adapter", "adapter_type", "peft_type", "finetuning_type", "use_peft"),
    "method.name: dora": ("use_dora", "peft_use_dora"),
    "method.r": ("lora_r", "lora_rank", "rank", "r"),
    "method.alpha": ("lora_alpha", "alpha"),
    "method.dropout": ("lora_dropout", "dropout"),
    "method.bias": ("lora_bias",),
    "method.scaling: rslora": ("use_rslora",),
    "method.target_modules": ("lora_target_modules", "lora_target", "lora_attn_modules", "target_modules"),
    "method.modules_to_save": ("lora_modules_to_save", "additional_target", "modules_to_save"),
    "method.start": ("init_lora_weights",),
    "train.lr": ("learning_rate", "lr"),
    "train.lr_ratio": ("loraplus_lr_ratio", "lora_plus_lr_ratio"),
    "train.epochs": ("num_train_epochs", "num_epochs", "n_epochs", "epochs"),
    "train.max_steps": ("max_train_steps", "max_iters", "num_steps", "num_train_steps"),
    "train.batch_size": ("per_device_train_batch_size", "train_batch_size", "per_gpu_train_batch_size",
                         "micro_batch_size", "batch_size"),
    "train.eval_batch_size": ("per_device_eval_batch_size", "per_gpu_eval_batch_size"),
    "train.accumulation": ("gradient_accumulation_steps", "gradient_accumulation", "grad_accum", "grad_accumulation"),
    "train.checkpointing": ("gradient_checkpointing", "use_gradient_checkpointing", "activation_checkpointing",
                            "enable_activation_checkpointing"),
    "train.packing": ("sample_packing", "packed", "padding_free"),
    "train.shard": ("fsdp", "deepspeed", "fsdp_config"),
    "train.optimizer": ("optim", "optimizer_type"),
    "train.schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler"),
    "train.warmup": ("warmup_ratio", "warmup_steps", "num_warmup_steps"),
    "train.clip": ("max_grad_norm", "clip_grad_norm", "gradient_clipping", "grad_clip"),
    "train.weight_decay": ("wd",),
    "train.max_length": ("max_seq_length", "max_seq_len", "max_sequence_length", "model_max_length", "sequence_len",
                         "cutoff_len", "seq_len", "block_size", "max_length"),
    "train.overlong": ("truncation",),
    "train.seed": ("random_seed", "data_seed", "random_state"),
    "train.eval_every": ("eval_steps", "evaluation_steps", "eval_interval"),
    "train.patience": ("early_stopping_patience",),
    "train.checkpoint_every": ("save_steps", "save_every", "save_interval"),
    "train.keep_checkpoints": ("save_total_limit", "keep_last_n_checkpoints"),
    "train.log_every": ("logging_steps", "log_every_n_steps", "log_interval"),
}  # fmt: skip

OURS = MappingProxyType({peer: ours for ours, peers in _PEERS.items() for peer in peers})
"""A key -> where it stands in a run's config, and with which value where the key alone says it: "quant: nf4"."""
