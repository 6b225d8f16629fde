#!/usr/bin/env python3
"""Train a detector, or evaluate one with --eval-only.

    train_net.py --config-file configs/quickstart.yaml [--num-gpus 8] [--resume] KEY VALUE ...

Like every Detectron2 project's training script, it is meant to be changed: override a method of
``Trainer`` for another hook, evaluator, data loader, model or optimizer.
"""

import sys

from retinanet_ext import engine


class Trainer(engine.Trainer):
    """The trainer of every run. It can override, among others, these methods."""

    def build_hooks(self):
        """Return the hooks in the order in which they are called."""
        return super().build_hooks()

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        """Return the evaluator that fits the data set's ``evaluator_type``."""
        return super().build_evaluator(cfg, dataset_name)

    @classmethod
    def build_train_loader(cls, cfg):
        """Return the iterable of training batches."""
        return super().build_train_loader(cfg)

    @classmethod
    def build_optimizer(cls, cfg, model):
        """Return the optimizer of the model's parameters."""
        return super().build_optimizer(cfg, model)


def setup(args):
    """Return the frozen config of a run whose data are registered. Nothing is written yet."""
    cfg = engine.load_config(args.config_file, args.opts)
    engine.prepare_run(cfg, args)
    return cfg


def main(args):
    """Train or evaluate, in each process of a run."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        engine.load_trained_weights(model, cfg, resume=args.resume)
        engine.start_run(cfg, args)
        results = Trainer.test(cfg, model)
        engine.report_results(cfg, results)
        return results

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    engine.start_run(cfg, args)  # writes the first file, because nothing can be refused any more
    return trainer.train()


if __name__ == "__main__":
    args = engine.argument_parser().parse_args()
    sys.exit(
        engine.launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    )
