// A chess board in SVG, and what stands around it: a game against a policy, one group of siblings, a finished game.
// No library and no request. The rules of chess stay in Python: it sends positions and legal moves, and is told of
// moves. The drawings of the pieces come from Python too (python-chess).

const SQUARE = 45;                                            // the drawings of the pieces are made for this size
const GREEN = "#2f9e60", RED = "#e0533d", BLUE = "#2b7de0";
const NAMES = { q: "queen", r: "rook", b: "bishop", n: "knight" };

function make(tag, attributes = {}, parent = null, text = "") {
  // An HTML or SVG element; `text` is never read as markup.
  const inSvg = tag === "svg" || (parent && parent instanceof SVGElement);
  const node = inSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== "") node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function button(parent, label, title, act) {
  const node = make("button", { type: "button", title, "aria-label": title }, parent, label);
  node.addEventListener("click", act);
  return node;
}

function piecesOf(fen) {
  // {square: letter} of a position in Forsyth-Edwards notation.
  const found = {};
  fen.split(" ")[0].split("/").forEach((row, down) => {
    let file = 0;
    for (const sign of row) {
      if (sign >= "1" && sign <= "8") file += Number(sign);
      else found["abcdefgh"[file++] + (8 - down)] = sign;
    }
  });
  return found;
}

export class Board {
  // draw({fen, flipped, legal, last, check, arrows}); calls onMove(uci) when somebody has moved a piece.
  constructor(parent, pieces, onMove = null) {
    Object.assign(this, { pieces, onMove, view: { fen: "8/8/8/8/8/8/8/8" }, chosen: null, drag: null });
    this.svg = make("svg", { viewBox: "0 0 360 360", class: "gc-board", role: "img" }, parent);
    this.layers = {};
    for (const name of ["squares", "marks", "men", "arrows", "hand", "choice"])
      this.layers[name] = make("g", { class: `gc-${name}` }, this.svg);
    if (!onMove) return;
    this.svg.classList.add("gc-live");
    this.svg.addEventListener("pointerdown", (e) => this.press(e));
    this.svg.addEventListener("pointermove", (e) => this.move(e));
    this.svg.addEventListener("pointerup", (e) => this.release(e));
    this.svg.addEventListener("pointercancel", () => this.forget());
  }

  corner(square) {
    // Upper left corner of a square, in units of the drawing.
    const file = square.charCodeAt(0) - 97, rank = Number(square[1]) - 1;
    return this.view.flipped ? [(7 - file) * SQUARE, rank * SQUARE] : [file * SQUARE, (7 - rank) * SQUARE];
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * 360, ((event.clientY - box.top) / box.height) * 360];
  }

  squareAt([x, y]) {
    let file = Math.floor(x / SQUARE), down = Math.floor(y / SQUARE);
    if (file < 0 || file > 7 || down < 0 || down > 7) return null;
    if (this.view.flipped) [file, down] = [7 - file, 7 - down];
    return "abcdefgh"[file] + (8 - down);
  }

  targets(square) {
    return (this.view.legal || []).filter((uci) => uci.startsWith(square));
  }

  draw(view) {
    this.view = view;
    this.chosen = this.drag = null;
    this.svg.setAttribute("aria-label", `chess position ${view.fen}`);
    this.drawSquares();
    this.layers.men.replaceChildren();
    for (const [square, letter] of Object.entries(piecesOf(view.fen))) this.man(square, letter, this.layers.men);
    this.layers.arrows.replaceChildren();
    for (const arrow of view.arrows || []) this.arrow(arrow);
    this.layers.choice.replaceChildren();
    this.mark();
  }

  drawSquares() {
    this.layers.squares.replaceChildren();
    for (let k = 0; k < 64; k++) {
      const square = "abcdefgh"[k % 8] + (Math.floor(k / 8) + 1), [x, y] = this.corner(square);
      const dark = (k + Math.floor(k / 8)) % 2 === 0, tone = dark ? "gc-dark" : "gc-pale";
      const box = { x, y, width: SQUARE, height: SQUARE, class: tone, "data-square": square };
      make("rect", box, this.layers.squares);
      if ((this.view.last || "").slice(0, 4).match(/../g)?.includes(square))
        make("rect", { ...box, "data-square": "", class: "gc-last" }, this.layers.squares);
      if (this.view.check === square) make("rect", { ...box, "data-square": "", class: "gc-check" }, this.layers.squares);
      const ink = dark ? "gc-onDark" : "gc-onPale";
      if (y === 315) make("text", { x: x + 38, y: y + 43, class: ink }, this.layers.squares, square[0]);
      if (x === 0) make("text", { x: x + 2, y: y + 10, class: ink }, this.layers.squares, square[1]);
    }
  }

  man(square, letter, layer) {
    const [x, y] = this.corner(square);
    const at = { transform: `translate(${x} ${y})`, "data-piece": letter, "data-at": square };
    const node = make("g", at, layer);
    node.innerHTML = this.pieces[letter];                     // python-chess drew it
    return node;
  }

  arrow({ uci, color = BLUE, width = 6, opacity = 0.8, title = "" }) {
    const [a, b] = [uci.slice(0, 2), uci.slice(2, 4)].map((s) => this.corner(s).map((v) => v + SQUARE / 2));
    const length = Math.hypot(b[0] - a[0], b[1] - a[1]), [ux, uy] = [(b[0] - a[0]) / length, (b[1] - a[1]) / length];
    const head = 7 + width, tip = [b[0] - 3 * ux, b[1] - 3 * uy], neck = [tip[0] - head * ux, tip[1] - head * uy];
    const wing = (side) => `${neck[0] - side * uy * head * 0.6},${neck[1] + side * ux * head * 0.6}`;
    const group = make("g", { opacity, "data-arrow": uci }, this.layers.arrows);
    if (title) make("title", {}, group, title);
    const line = { x1: a[0] + 9 * ux, y1: a[1] + 9 * uy, x2: neck[0], y2: neck[1], stroke: color };
    make("line", { ...line, "stroke-width": width }, group);
    make("polygon", { points: `${tip[0]},${tip[1]} ${wing(1)} ${wing(-1)}`, fill: color }, group);
  }

  mark() {
    // The chosen piece and where it can go.
    this.layers.marks.replaceChildren();
    if (!this.chosen) return;
    const [x, y] = this.corner(this.chosen);
    make("rect", { x, y, width: SQUARE, height: SQUARE, class: "gc-chosen" }, this.layers.marks);
    for (const square of new Set(this.targets(this.chosen).map((uci) => uci.slice(2, 4)))) {
      const [cx, cy] = this.corner(square).map((v) => v + SQUARE / 2);
      make("circle", { cx, cy, r: 7, class: "gc-target", "data-target": square }, this.layers.marks);
    }
  }

  press(event) {
    event.preventDefault();
    const square = this.squareAt(this.point(event));
    const picked = event.target.closest("[data-promotion]");
    if (picked) return this.tell(picked.dataset.promotion);
    if (this.layers.choice.firstChild) return this.draw(this.view);           // a click beside the choice ends it
    if (this.chosen && square && square !== this.chosen && !this.targets(square).length) return this.put(square);
    if (!square || !this.targets(square).length) return this.forget();
    this.again = this.chosen === square;                                      // a second click puts it back
    this.chosen = square;
    this.drag = { from: square, node: this.layers.men.querySelector(`[data-at=${square}]`) };
    this.svg.setPointerCapture?.(event.pointerId);
    this.mark();
  }

  move(event) {
    if (!this.drag) return;
    const [x, y] = this.point(event);
    if (this.squareAt([x, y]) !== this.drag.from) this.drag.away = true;
    this.layers.hand.append(this.drag.node);                                  // above the arrows
    this.drag.node.setAttribute("transform", `translate(${x - SQUARE / 2} ${y - SQUARE / 2})`);
  }

  release(event) {
    if (!this.drag) return;
    const { from, node, away } = this.drag, square = this.squareAt(this.point(event));
    this.drag = null;
    this.layers.men.append(node);
    node.setAttribute("transform", `translate(${this.corner(from).join(" ")})`);
    if (square && square !== from) this.put(square);
    else if (away || this.again) this.forget();
  }

  put(square) {
    const moves = this.targets(this.chosen).filter((uci) => uci.slice(2, 4) === square);
    if (moves.length > 1) return this.choose(moves, square);
    this.tell(moves[0] || this.chosen + square);                              // Python says why it cannot be
  }

  choose(moves, square) {
    // Which piece a pawn becomes: a column of four from the square on, towards the middle of the board.
    const [x, y] = this.corner(square), step = y < 180 ? SQUARE : -SQUARE, white = square[1] === "8";
    moves.forEach((uci) => {
      const kind = uci[4], row = "qrbn".indexOf(kind), letter = white ? kind.toUpperCase() : kind;
      const node = make("g", { transform: `translate(${x} ${y + row * step})`, "data-promotion": uci },
        this.layers.choice);
      make("rect", { width: SQUARE, height: SQUARE, class: "gc-offer" }, node);
      make("g", {}, node).innerHTML = this.pieces[letter];
      make("title", {}, node, NAMES[kind]);
    });
  }

  tell(uci) {
    this.forget();
    this.layers.choice.replaceChildren();
    this.onMove(uci);
  }

  forget() {
    if (this.drag) this.layers.men.append(this.drag.node);
    if (this.drag) this.drag.node.setAttribute("transform", `translate(${this.corner(this.drag.from).join(" ")})`);
    this.chosen = this.drag = null;
    this.mark();
  }
}

export class Game {
  // A finished game on a board: buttons and a list of moves step through it. show(ply) is told to onStep(ply).
  constructor(parent, pieces, onStep = () => {}) {
    Object.assign(this, { onStep, ply: 0, game: { fens: ["8/8/8/8/8/8/8/8"], ucis: [], sans: [] }, arrows: null });
    this.board = new Board(parent, pieces);
    const row = make("div", { class: "gc-row" }, parent);
    button(row, "«", "to the start", () => this.show(0));
    button(row, "‹", "one ply back", () => this.show(this.ply - 1));
    button(row, "›", "one ply on", () => this.show(this.ply + 1));
    button(row, "»", "to the end", () => this.show(this.game.sans.length));
    this.where = make("span", { class: "gc-where", "aria-live": "polite" }, row);
    this.moves = make("div", { class: "gc-moves" }, parent);
  }

  load(game, ply = 0) {
    this.game = game;
    this.moves.replaceChildren();
    game.sans.forEach((san, k) => {
      const side = (k + (game.black ? 1 : 0)) % 2, number = game.number + Math.floor((k + (game.black ? 1 : 0)) / 2);
      const label = side === 0 ? `${number}. ` : k === 0 ? `${number}… ` : "";
      if (label) make("span", { class: "gc-number" }, this.moves, label);
      const node = make("span", { class: "gc-san", role: "button", tabindex: "0" }, this.moves, san);
      const act = () => this.show(k + 1);
      node.addEventListener("click", act);
      node.addEventListener("keydown", (e) => e.key === "Enter" && act());
      this.moves.append(" ");
    });
    this.show(ply);
  }

  show(ply) {
    const end = this.game.sans.length;
    this.ply = Math.max(0, Math.min(ply, end));
    const last = this.ply ? this.game.ucis[this.ply - 1] : "";
    const arrows = this.arrows ? this.arrows(this.ply) : [];
    this.board.draw({ fen: this.game.fens[this.ply], flipped: this.game.flipped, last, arrows });
    this.where.textContent = `after ${this.ply} of ${end} plies`;
    this.moves.querySelectorAll(".gc-san").forEach((node, k) => {
      node.classList.toggle("gc-now", k + 1 === this.ply);
      if (k + 1 === this.ply) this.moves.scrollTop = node.offsetTop - this.moves.offsetTop - 40;
    });
    this.onStep(this.ply);
  }
}

function frame(el) {
  const root = make("div", { class: "gc" }, el);
  root.addEventListener("keydown", (e) => e.stopPropagation());     // JupyterLab would take a slider's arrow keys
  return [make("div", { class: "gc-left" }, root), make("div", { class: "gc-right" }, root)];
}

function renderPlay({ model, el }) {
  // Everything that is seen is the trait `view`; everything that is done is a message to Python.
  const [left, right] = frame(el), say = (kind, more = {}) => model.send({ kind, ...more });
  const board = new Board(left, model.get("pieces"), (uci) => say("move", { uci }));
  const message = make("div", { class: "gc-message", role: "status" }, right);
  const row = make("div", { class: "gc-row" }, right);
  button(row, "undo", "take the last move back", () => say("undo"));
  button(row, "flip", "turn the board", () => say("flip"));
  button(row, "new game", "a new game, you play White", () => say("new", { white: true }));
  button(row, "as Black", "a new game, you play Black", () => say("new", { white: false }));
  const heat = make("label", { class: "gc-row" }, right);
  make("span", {}, heat, "temperature");
  const slider = make("input", { type: "range", min: 0, max: 2, step: 0.05, "aria-label": "temperature" }, heat);
  const number = make("output", {}, heat);
  slider.addEventListener("input", () => { number.textContent = Number(slider.value).toFixed(2); });
  let asked = null;                                            // a temperature that Python has not answered yet
  slider.addEventListener("change", () => {
    asked = Number(slider.value);
    say("temperature", { value: asked });
  });
  const thinks = make("label", { class: "gc-row" }, right);
  const tick = make("input", { type: "checkbox" }, thinks);
  make("span", {}, thinks, "show what the policy would play here");
  tick.addEventListener("change", () => say("arrows", { on: tick.checked }));
  const list = make("div", { class: "gc-list" }, right), moves = make("div", { class: "gc-moves" }, right);
  function draw() {
    const view = model.get("view");
    board.draw({ ...view, arrows: view.thoughts.map((t) => (
      { uci: t.uci, width: 3 + 9 * t.p, opacity: 0.35 + 0.5 * t.p, title: `${t.san} ${(100 * t.p).toFixed(0)} %` })) });
    message.textContent = view.message;
    message.classList.toggle("gc-wrong", view.wrong);
    if (asked === view.temperature || view.wrong) asked = null;
    if (asked === null) slider.value = view.temperature;         // an older answer must not move the slider back
    number.textContent = Number(slider.value).toFixed(2);
    tick.checked = view.shown;
    list.replaceChildren();
    for (const t of view.thoughts) {
      const line = make("div", { class: "gc-thought", "data-move": t.uci }, list);
      make("span", {}, line, t.san);
      make("span", { class: "gc-bar", style: `width: ${(50 * t.p).toFixed(1)}%` }, line);
      make("span", {}, line, `${(100 * t.p).toFixed(1)} %`);
    }
    moves.textContent = view.moves;
  }
  model.on("change:view", draw);
  draw();
  return () => model.off("change:view", draw);
}

function renderGroup({ model, el }) {
  // The siblings of one start. Stepping needs no kernel; `sibling` and `ply` are told to it.
  const group = model.get("group"), [left, right] = frame(el);
  const tell = (name, value) => { if (model.get(name) !== value) { model.set(name, value); model.save_changes(); } };
  const colour = (a) => (a > 0 ? BLUE : a < 0 ? RED : "#8a8a8a");
  const caption = make("div", { class: "gc-message", role: "status" }, right);
  const table = make("table", { class: "gc-table" }, make("div", { class: "gc-scroll" }, right));
  let sibling = model.get("sibling");
  const viewer = new Game(left, model.get("pieces"), (ply) => { drawTable(ply); tell("ply", ply); });
  const here = (ply) => group.games.filter((g) => g.ucis[ply] && g.fens[ply] === group.games[sibling].fens[ply]);
  viewer.arrows = (ply) => here(ply).map((g) => ({ uci: g.ucis[ply], color: colour(g.advantage[ply]), width: 5,
    opacity: g === group.games[sibling] ? 0.9 : 0.45, title: `game ${group.games.indexOf(g)}: ${g.sans[ply]}` }));
  function drawTable(ply) {
    const shown = here(ply).length, all = group.games.length;
    const same = shown === all ? "all siblings stand here" : `${shown} of ${all} siblings stand here`;
    caption.textContent = ply < group.plies ? `ply ${ply}: ${same}` : "after the last ply";
    table.replaceChildren();
    const head = make("tr", {}, make("thead", {}, table));
    for (const name of ["game", "move", "reward", "ratio", "advantage"]) make("th", {}, head, name);
    const body = make("tbody", {}, table);
    group.games.forEach((g, k) => {
      const line = make("tr", { "data-game": k, tabindex: "0" }, body);
      line.classList.toggle("gc-now", k === sibling);
      line.addEventListener("click", () => choose(k));
      line.addEventListener("keydown", (e) => e.key === "Enter" && choose(k));
      make("td", {}, line, k);
      make("td", {}, line, g.sans[ply] ?? "–");
      if (!g.sans[ply] || !g.train[ply]) return make("td", { colspan: 3 }, line, g.sans[ply] ? "does not train" : "");
      make("td", {}, line, g.reward[ply].toFixed(3));
      const outside = Math.abs(g.ratio[ply] - 1) > group.epsilon;
      const ratio = make("td", {}, line, g.ratio[ply].toFixed(3));
      if (outside) ratio.classList.add("gc-outside");
      const a = g.advantage[ply], cell = make("td", {}, line, (a > 0 ? "+" : "") + a.toFixed(3));
      cell.style.color = colour(a);
    });
    const mean = group.mean[ply], foot = make("tr", {}, make("tfoot", {}, table));
    make("td", { colspan: 2 }, foot, "mean");
    make("td", {}, foot, mean == null ? "" : mean.toFixed(3));
    make("td", { colspan: 2 }, foot, "");
  }
  function choose(k, ply = viewer.ply) {
    sibling = k;
    tell("sibling", k);
    viewer.load(group.games[k], ply);
  }
  const follow = () => {
    if (model.get("sibling") !== sibling || model.get("ply") !== viewer.ply) choose(model.get("sibling"), model.get("ply"));
  };
  model.on("change:sibling", follow);
  model.on("change:ply", follow);
  choose(sibling, model.get("ply"));
  return () => { model.off("change:sibling", follow); model.off("change:ply", follow); };
}

function render(context) {
  return context.model.get("kind") === "group" ? renderGroup(context) : renderPlay(context);
}

export default { render };
