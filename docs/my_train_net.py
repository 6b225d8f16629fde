"""A training script with one more hook and another evaluator: ``train_net.py``, changed."""

import sys

from detectron2.engine import HookBase
from detectron2.evaluation import COCOEvaluator

from retinanet_ext import engine


class PrintLearningRate(HookBase):
    def after_step(self):
        print(f"iteration {self.trainer.iter}: {self.trainer.optimizer.param_groups[0]['lr']:g}")


class Trainer(engine.Trainer):
    def build_hooks(self):
        return [*super().build_hooks(), PrintLearningRate()]

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, tasks=("bbox",), max_dets_per_image=50)


def main(args):
    cfg = engine.load_config(args.config_file, args.opts)
    engine.prepare_run(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        engine.load_trained_weights(model, cfg, resume=args.resume)
        engine.start_run(cfg, args)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    engine.start_run(cfg, args)
    return trainer.train()


if __name__ == "__main__":
    args = engine.argument_parser().parse_args()
    processes = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    sys.exit(engine.launch(main, *processes, args=(args,)))
