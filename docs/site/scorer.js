// SPDX-License-Identifier: Apache-2.0
// Sphinx's own weights; but what is for those who change the package comes behind what is for users.
const INSIDE = /^(docs\/adr\/|docs\/architecture$|CHANGELOG$|CONTRIBUTING$)/;

var Scorer = {
  score: ([docname, title, anchor, descr, score]) => (INSIDE.test(docname) ? score - 100 : score),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
