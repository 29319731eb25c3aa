"""The script `planned_training.py` inside Lightning Fabric, which sets up processes and data."""

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger
from planned_training import BATCH_SIZE, NUM_STEPS, Model, get_batch, loss_fn
from torch.utils.data import DataLoader

import runtime


def main() -> None:
    loggers = CSVLogger("logs", flush_logs_every_n_steps=1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", loggers=loggers)
    fabric.launch()  # joins the processes that torchrun has started
    torch.manual_seed(0)
    model = Model()  # a plan is a strategy of its own: no fabric.setup(), no fabric.backward()
    batches = [get_batch(BATCH_SIZE) for _ in range(NUM_STEPS)]
    loader = DataLoader(batches, batch_size=None)
    loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    with runtime.connect("plan.yaml", model, loss_fn=loss_fn) as executor:
        for step, batch in enumerate(loader):
            loss = executor.mean_loss(executor.step(batch))
            fabric.log("loss", loss, step)
            fabric.print(f"step {step} loss {loss:.9f}")
        executor.save("checkpoint")  # what is trained; any plan of the model goes on from it
    fabric.save("settings.pt", {"num_steps": NUM_STEPS})  # whatever else there is


if __name__ == "__main__":
    main()
