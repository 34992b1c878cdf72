"""What does the MLP layer compute? Two projections, the squared ReLU between them (Nemotron-H, arXiv 2504.03624)."""

from torch import Tensor, nn

from nemotron_train.model.reference.norm import NormedLinear
from nemotron_train.model.reference.sizes import ReferenceSizes


class SquaredReluMlp(nn.Module):
    def __init__(self, sizes: ReferenceSizes) -> None:
        super().__init__()
        self.linear_fc1 = NormedLinear(sizes.ffn_hidden_size, sizes, bias=sizes.linear_bias)
        self.linear_fc2 = nn.Linear(sizes.ffn_hidden_size, sizes.hidden_size, bias=sizes.linear_bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.linear_fc2(self.linear_fc1(x_BSD).relu().square())
