"""Trainers of TRL and models of PEFT."""

from __future__ import annotations

import pytest

from hugging_face import (
    Sequences,
    arguments,
    compared,
    language_model,
    transformers,
)

TRL_WARNS = pytest.mark.filterwarnings("ignore")  # of its own and its parts' future


def with_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
    return peft.get_peft_model(language_model(), config)


@TRL_WARNS
def test_adapters_of_peft_train_as_with_both_numbers_written_by_hand(tmp_path):
    pytest.importorskip("peft")

    compared(tmp_path, model=with_adapter).check()


def sft_trainer(folder, **options):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokens = [each.tolist() for each in Sequences().data]
    transformers.set_seed(3)
    trainer = trl.SFTTrainer(
        model=language_model(),
        args=trl.SFTConfig(**{**arguments(folder).to_dict(), **options}),
        train_dataset=datasets.Dataset.from_dict({"input_ids": tokens}),
        processing_class=word_tokenizer(),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def word_tokenizer():
    from tokenizers import Tokenizer, models

    words = {"[PAD]": 0, **{f"w{at}": at for at in range(1, 64)}}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")),
        pad_token="[PAD]",
        eos_token="w2",
    )


@TRL_WARNS
def test_the_sft_trainer_trains_as_with_both_numbers_written_by_hand(tmp_path):
    pair = compared(tmp_path, sft_trainer)

    pair.check()
    assert pair.report.plan.effective_batch_size == 24
    assert pair.tuned._total_train_tokens == pair.by_hand._total_train_tokens
