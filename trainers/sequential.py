"""Sequential fine-tuning: every stage continues from the one before, and nothing is done against forgetting.

It is the lower bound that every method is compared with ("SeqFT" and "LoraSeqFT" in the paper, section 4.1). It trains
a LoRA adapter (`use_peft: true`) or all parameters.

    python -m trainers.sequential --config trainers/configs/quickstart.yaml --output_dir runs/sequential
"""

from trainers.base import CLConfig, CLTrainer, main

if __name__ == "__main__":
    main(CLTrainer, CLConfig)
