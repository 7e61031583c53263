"""The command `treadle`. Commands load when they are called: `--help` imports neither grpc nor numpy.

Knows only the names of the commands and one line about each.
"""

from treadle.cli.lazy import LazyCommand, LazyGroup

COMMANDS = {
    "up": LazyCommand("treadle.cli.up:up", "Start a whole Treadle on this machine."),
    "demo": LazyCommand("treadle.cli.demo:demo", "Two tenants train two adapters on one base, on this machine."),
    "sft": LazyCommand("treadle.cli.train:sft", "Fine-tune an adapter on your own examples."),
    "rl": LazyCommand("treadle.cli.train:rl", "Train an adapter on its own answers, by a reward function."),
    "dpo": LazyCommand("treadle.cli.train:dpo", "Train an adapter on preferences."),
    "distill": LazyCommand("treadle.cli.train:distill", "Train an adapter to answer as a teacher does."),
    "eval": LazyCommand("treadle.cli.train:eval_", "Measure an adapter or a base on your own rows."),
    "chat": LazyCommand("treadle.cli.chat:chat", "Talk to a base or a saved adapter."),
    "top": LazyCommand("treadle.cli.top:top", "Watch runs, workers and tokens per second."),
    "bench": LazyCommand("treadle.cli.bench:bench", "Measure how fast a deployment trains and samples."),
    "completion": LazyCommand("treadle.cli.completion:completion", "Print a shell's completion script."),
    "key": LazyCommand("treadle.cli.keys:key", "Create, list and revoke API keys."),
    "tenant": LazyCommand("treadle.cli.tenants:tenant", "Create and list tenants, set their quotas."),
    "usage": LazyCommand("treadle.cli.usage:usage", "Show what a tenant has used."),
    "run": LazyCommand("treadle.cli.runs:run", "List, show and delete runs."),
    "adapter": LazyCommand("treadle.cli.adapters:adapter", "List, export and import saved adapters."),
    "dataset": LazyCommand("treadle.cli.datasets:dataset", "Export completions that were kept, to train on."),
    "sample": LazyCommand("treadle.cli.sample:sample", "Sample from a base or a saved adapter."),
    "store": LazyCommand("treadle.cli.store:store", "Check, clean, copy and restore a store's data."),
    "plan": LazyCommand("treadle.cli.plan:plan", "Predict utilisation, memory and cost of a load."),
    "doctor": LazyCommand("treadle.cli.doctor:doctor", "Check a deployment and say what is wrong."),
    "worker": LazyCommand("treadle.cli.workers:worker", "List the live trainers and samplers, trace what they do."),
}


def main() -> None:
    """Runs the command line of this process."""
    LazyGroup(COMMANDS, name="treadle", help="Fine-tune and sample many LoRA adapters on one warm base.")(
        prog_name="treadle"
    )
