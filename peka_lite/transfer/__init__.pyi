from .costs import Cost as Cost, student_cost as student_cost
from .fit import fit as fit
from .model import TransferModel as TransferModel, transfer_loss as transfer_loss
