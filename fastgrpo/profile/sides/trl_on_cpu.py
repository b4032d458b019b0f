"""Lets TRL be imported beside a CPU build of torch: import this module before `trl`.

torchvision is only to be had built for CUDA here, and its import then fails for want of two operators that nothing in a
comparison calls. Declaring their schemas is enough.
"""

import torch

if torch.version.cuda is None:  # a CUDA build's torchvision declares its own
    LIBRARY = torch.library.Library("torchvision", "DEF")
    LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
