"""What PruneSID keeps of a crop and of an image: [CLS] and patches, with their order and slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.core.decisions import MergeGroup
from tokenprune.core.stage import Positions
from tokenprune.core.tokens import ImageTokens
from tokenprune.errors import OptionError
from tokenprune_strategies.ops.before_projector import slots_of
from tokenprune_strategies.prunesid.selection import Patches, selected


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of a crop.

    Attributes:
        crop: the crop.
        patches: int64 [k], its kept tokens in their new order, in the host's memory.
        cls: whether [CLS] is kept too.
    """

    crop: ImageTokens
    patches: Tensor
    cls: bool

    @classmethod
    def of(cls, crop: ImageTokens, patches: Patches | None, *, in_order: bool) -> Kept:
        """What is selected.

        Args:
            crop: with its quota, [CLS] included.
            patches: of the crop, in the host's memory; None = there is nothing to choose: the quota is none, [CLS]
                alone, or every patch without [CLS].
            in_order: whether patches are in image order; else in the order of groups.
        """
        if patches is None:
            alone = 0 < crop.quota < len(crop)
            return cls(crop, crop.index_on_host[: crop.quota - alone], alone)
        picks = selected(patches, crop.quota)
        return cls(crop, crop.index_on_host[picks.sort().values if in_order else picks], True)


def new_tokens(image: Sequence[Kept], positions: Positions, device: torch.device) -> MergeGroup:
    """The new tokens of one image, from what is kept of its crops; [CLS] has origin −1.

    With one crop [CLS] comes first. With several crops, it is last, one for each; where kept patches of a crop come in
    another order than the image's, they fill the places of that crop's patches in their order, as in the authors' code.
    """
    places = torch.cat([one.patches.sort().values for one in image]).argsort()
    patches = torch.cat([one.patches for one in image])[places]
    none = patches.new_full((sum(one.cls for one in image),), -1)
    origins = torch.cat((none, patches) if len(image) == 1 else (patches, none))
    first = 0 if len(image) == 1 else len(patches)
    members = torch.cat([one.crop.index_on_host for one in image])
    slots = slots_of(origins, members, range(first, first + len(none)), positions)
    slots, origins, members = (part.to(device, non_blocking=True) for part in (slots, origins, members))
    # every new token is one patch; [CLS] is none
    return MergeGroup(image[0].crop.row, slots, members, (origins[:, None] == members).float(), origins)


def check_authors_keep(crop: ImageTokens, channels: int) -> None:
    """Raise OptionError where the authors' code stops with an error: no group, or more than there are channels."""
    if not 1 <= crop.quota // 4 <= channels:
        raise OptionError(
            f"strategy 'prunesid': option 'faithful': to keep {crop.quota} of an image's {len(crop)} tokens the "
            f"authors' code makes {crop.quota // 4} groups of {channels} channels, and stops with an error; choose "
            "another 'keep', or faithful=False"
        )
