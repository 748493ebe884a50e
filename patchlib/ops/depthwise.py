"""placeholder until the operator lands"""

import torch.nn.functional as F


def depthwise_conv2d(x, weight, bias=None, stride=1, padding="same", dilation=1):
    return F.conv2d(x, weight, bias, stride, padding, dilation, x.shape[1])
