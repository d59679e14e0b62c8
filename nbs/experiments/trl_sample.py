"""Two logs of another trainer: makes `nbs/data/trl_exact.json` and `nbs/data/trl_partial.json`.

    pip install trl                        # 1.16 made the stored files; nothing else is downloaded
    python nbs/experiments/trl_sample.py   # one CPU core, about a minute

TRL's own GRPOTrainer trains a network of two layers with random weights on sums of two numbers. The first reward is 1
for the exact answer and 0 for all else, as many first reward functions are; the second is how much of the answer is
right. Nothing else differs. The files are the trainer_state.json of each run's last checkpoint, as TRL wrote it."""

import difflib
import random
import shutil
import tempfile
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "data"
LETTERS = ["<pad>", "<eos>", *"0123456789+= "]


def tokenizer():
    "A token a letter."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.WordLevel({x: i for i, x in enumerate(LETTERS)}, unk_token=" "))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token=" ")


def exact(completions, answer, **_):
    "1 for the right sum, 0 for all else."
    return [float(text.strip() == right) for text, right in zip(completions, answer)]


def partial(completions, answer, **_):
    "How alike the text is to the right sum, from 0 to 1."
    return [difflib.SequenceMatcher(None, text.strip(), right).ratio() for text, right in zip(completions, answer)]


def train(reward):
    "A run of TRL; its trainer_state.json is kept."
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed
    from trl import GRPOConfig, GRPOTrainer

    set_seed(0)
    random.seed(0)
    size = dict(vocab_size=len(LETTERS), hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    model = Qwen2ForCausalLM(Qwen2Config(**size, **heads, eos_token_id=1, pad_token_id=0, bos_token_id=None))
    pairs = [(random.randrange(50), random.randrange(50)) for _ in range(200)]
    tasks = Dataset.from_list([dict(prompt=f"{a}+{b}=", answer=str(a + b)) for a, b in pairs])
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, report_to="none", use_cpu=True, seed=0, max_steps=120, logging_steps=4, save_steps=120,
            per_device_train_batch_size=32, num_generations=8, max_completion_length=32, learning_rate=1e-3, beta=.04,
            disable_tqdm=True)
        model.save_pretrained(f"{folder}/start")        # TRL reads a model from a folder only
        GRPOTrainer(f"{folder}/start", reward, args, tasks, processing_class=tokenizer()).train()
        shutil.copy(Path(folder) / "checkpoint-120/trainer_state.json", OUT / f"trl_{reward.__name__}.json")


if __name__ == "__main__":
    for reward in (exact, partial):
        train(reward)
