"""A program with flags and a settings file, as TRL's are.

usage: program.py --model_name_or_path MODEL --output_dir FOLDER --dataset_name ROWS …
"""

from datasets import load_dataset
from trl import (
    DatasetMixtureConfig,
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.rewards import get_soft_overlong_punishment


def letters(completions, **kwargs):
    return [float(len(set(str(completion)))) for completion in completions]


parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig))
script_args, training_args, model_args, dataset_args = parser.parse_args_and_config()

training_args.model_init_kwargs = dict(
    revision=model_args.model_revision,
    trust_remote_code=training_args.trust_remote_code,
    attn_implementation=model_args.attn_implementation,
    dtype=model_args.dtype,
)
if dataset_args.datasets:
    dataset = get_dataset(dataset_args)
else:
    dataset = load_dataset("json", data_files={"train": script_args.dataset_name, "test": script_args.dataset_name})

trainer = GRPOTrainer(
    model=model_args.model_name_or_path,
    reward_funcs=[letters, get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4)],
    args=training_args,
    train_dataset=dataset[script_args.dataset_train_split],
    eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
    quantization_config=get_quantization_config(model_args),
    peft_config=get_peft_config(model_args),
)
trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
trainer.save_model(training_args.output_dir)
trainer.accelerator.print(f"saved to {training_args.output_dir}")
