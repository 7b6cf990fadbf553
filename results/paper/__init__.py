"""Numbers printed in VisionZip: Longer is Better but Not Necessary in Vision Language Models (Yang, Chen, Tian, Wang,
Li, Yu, Jia; CVPR 2025; arXiv 2412.04467), Tables 1 to 5. Nothing in here was measured by zipeval.

scores.csv        Tables 1, 2 and 3: raw scores and the percentages printed beside them
averages.csv      their printed averages of percentages
efficiency.csv    Table 4
misalignment.csv  Table 5
"""
